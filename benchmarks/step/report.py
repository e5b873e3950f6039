"""Results of the step's benchmark: one table per workload, a JSON and a Markdown file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import torch

from madpo.benchmarks.head import report as head_report
from madpo.benchmarks.step.run import Row

PACKAGES = ("madpo", "torch", "transformers", "deepspeed", "trl", "accelerate", "triton", "flash-attn")
LEGEND = """\
- tokens/s: padding-free tokens of both sequences of every pair, each with its prompt, whatever a contender \
shares or pads; the median of the rounds.
- TFLOP/s and MFU: of a rank, by what the mathematics asks for, the same of every contender: shared prompts \
once, the head on completions only, the reference's forward unless it is cached.
- times the first: the median over rounds of the first contender's time over this one's. On a CPU contenders \
take turns in every round; on a GPU, whose memory each needs, one comes to its end before the next. In CPU \
time, of all ranks: steadier on a machine that is busy with other things.
- peak: the most memory of any rank, on a GPU allocated, on a CPU resident beyond what imports took.
- loss: of the last block of steps; off by: the largest difference of any block's from the first contender's.
"""
COLUMNS = {
    "contender": "contender",
    "step_seconds": "s/step",
    "spread": "quartiles",
    "tokens_per_second": "tokens/s",
    "tflops": "TFLOP/s",
    "mfu": "MFU",
    "times_first": "times the first",
    "cpu_times_first": "in CPU time",
    "peak_mib": "peak MiB",
    "loss": "loss",
    "loss_gap": "off by",
}
TELLING = ("contender", "step_seconds", "times_first", "tokens_per_second", "mfu", "peak_mib", "loss")
"""The columns that a screen shows first, which may have no room for all."""
FORMATS = {
    "tokens_per_second": ",.0f",
    "mfu": ".1%",
    "times_first": ".2f",
    "cpu_times_first": ".2f",
    "peak_mib": ",.0f",
    "loss": ".5f",
    "loss_gap": ".0e",
}
WORKLOAD = ("model", "data", "lora", "ranks", "pairs", "dtype")


def facts(command: str) -> dict[str, Any]:
    """Date, hardware, command and versions of a run; for a CPU also how busy it was."""
    on_gpu = torch.cuda.is_available()
    facts = head_report.facts(command, torch.device("cuda" if on_gpu else "cpu"), PACKAGES)
    if not on_gpu:
        facts["load"] = f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} before the start"
    return facts


def title(row: dict[str, Any]) -> str:
    """The workload of a row in words."""
    ranks = "1 rank" if row["ranks"] == 1 else f"{row['ranks']} ranks, ZeRO-3"
    trained = f"{row['model']}{', LoRA' if row['lora'] else ''}"
    return f"{trained}, {row['data']} lengths, {row['pairs']} pairs a step, {row['dtype']}, {ranks}"


def columns_of(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The COLUMNS in which any of the rows has a value."""
    return {
        name: title
        for name, title in COLUMNS.items()
        if name == "spread" or any(row[name] is not None for row in rows)
    }


def that_fit(rows: Sequence[dict[str, Any]], width: int) -> dict[str, str]:
    """The columns that fit a screen of this width, the most telling first."""
    columns = columns_of(rows)
    order = dict.fromkeys([*(name for name in TELLING if name in columns), *columns])
    sizes = [3 + max(map(len, [columns[name], *(cells(row, [name])[0] for row in rows)])) for name in order]
    fitting = max(1, sum(total < width for total in accumulate(sizes)))
    return {name: columns[name] for name in list(order)[:fitting]}


def cells(row: dict[str, Any], columns: Iterable[str]) -> list[str]:
    """One line of a table."""
    if row["refused"]:
        return [row["contender"], row["refused"], *["" for _ in columns][2:]]
    shown = {**row, "spread": f"{row['p25']:.3g} - {row['p75']:.3g}"}
    return [_cell(shown[name], FORMATS.get(name, ".3g")) for name in columns]


def _cell(value: Any, form: str) -> str:
    return "" if value is None else value if isinstance(value, str) else format(value, form)


def write(folder: Path, facts: dict[str, Any], rows: Sequence[Row]) -> list[Path]:
    """Write JSON and Markdown. A later run of the same day replaces the workloads that it measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{head_report.stem(facts, 'step')}.json"
    new = [asdict(row) for row in rows]
    old = json.loads(path.read_text()) if path.exists() else {"rows": [], "commands": []}
    again = {_workload(row) for row in new}
    unchanged = [row for row in old["rows"] if _workload(row) not in again]
    load = f"  # {facts['load']}" if "load" in facts else ""
    commands = list(dict.fromkeys([*old["commands"], facts["command"] + load]))
    everything = {**facts, "commands": commands, "rows": unchanged + new}
    path.write_text(json.dumps(everything, indent=1) + "\n")
    markdown = path.with_suffix(".md")
    markdown.write_text(as_markdown(everything))
    return [path, markdown]


def as_markdown(everything: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in everything["versions"].items())
    lines = [f"# Training step on {everything['hardware']}, {everything['date']}", ""]
    lines += [*(f"    {command}" for command in everything["commands"]), ""]
    lines += [f"{everything['hardware']}. Versions: {versions}.", "", LEGEND]
    for _, group in groupby(everything["rows"], _workload):
        rows = list(group)
        columns = columns_of(rows)
        lines += ["", f"## {title(rows[0])}", "", "| " + " | ".join(columns.values()) + " |"]
        lines += ["|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += ["| " + " | ".join(cells(row, columns)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _workload(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in WORKLOAD)
