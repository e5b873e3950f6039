"""Results of the head's benchmark: tables on the terminal, a JSON and a Markdown file, a plot."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from madpo.benchmarks.head.measure import LIMIT

if TYPE_CHECKING:
    from madpo.benchmarks.head.measure import Row

PACKAGES = ("madpo", "torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")
LEGEND = """\
- of limit: the time of the bare GEMMs of the same shapes, measured in the same run, over the head's.
- TFLOP/s: useful work, 8 M H V (6 M H V with a frozen head), whatever a head computes twice.
- MiB: the most memory in use during a step beyond inputs and gradients.
- logp err: nats, the largest error of any sequence's log-prob. dH err, dW err: relative, against float64.
"""
ON_A_CPU = "Measured on a CPU, with plain torch in place of the Triton kernels: the times mean nothing."
COLUMNS = {
    "head": "head",
    "ms": "ms",
    "spread": "p20 - p80",
    "tflops": "TFLOP/s",
    "share_of_limit": "of limit",
    "working_mib": "MiB",
    "logp_error": "logp err",
    "d_hidden_error": "dH err",
    "d_weight_error": "dW err",
}
LOGITS_COLUMNS = {
    "head": "head",
    "ms": "ms",
    "spread": "p20 - p80",
    "gb_per_s": "GB/s",
    "share_of_limit": "of a copy",
}

Key = tuple[str, int, str, str]
"""(shape, rows, dtype, variant): the problem of one table, with a line per head."""


def facts(command: str, device: torch.device, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Date, hardware, command and versions of a run."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "command": command,
        "versions": {name: number for name in packages if (number := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def stem(facts: dict[str, Any], what: str = "head") -> str:
    """A file name without its ending, as in head_nvidia-h200_2026-11-21."""
    return f"{what}_{re.sub('[^a-z0-9]+', '-', facts['hardware'].lower())}_{facts['date']}"


def merge(path: Path, facts: dict[str, Any], rows: Iterable[Row], absent: dict[str, str]) -> dict[str, Any]:
    """The results with those of an existing file: a later run replaces the rows that it measured again."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    return together(old, facts, rows, absent)


def together(
    old: Iterable[dict[str, Any]], facts: dict[str, Any], rows: Iterable[Row], absent: dict[str, str]
) -> dict[str, Any]:
    """The content of a file: facts, new rows, and old rows that were not measured again."""
    new = [asdict(row) for row in rows]
    replaced = {(_key(row), row["head"]) for row in new}
    unchanged = [row for row in old if (_key(row), row["head"]) not in replaced]
    return {**facts, "absent": absent, "rows": [*unchanged, *new]}


def _key(row: dict[str, Any]) -> Key:
    return row["shape"], row["rows"], row["dtype"], row["variant"]


def tables(results: dict[str, Any]) -> dict[Key, list[dict[str, Any]]]:
    """The rows of each problem, the fastest first."""
    out: dict[Key, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        out.setdefault(_key(row), []).append(row)
    for rows in out.values():
        rows.sort(key=lambda row: (row["ms"] is None, row["ms"] or 0.0))
    return out


def cells(row: dict[str, Any]) -> list[str]:
    """One line of a table."""
    columns = columns_of(row["variant"])
    if row["refused"]:
        return [row["head"], row["refused"], *[""] * (len(columns) - 2)]
    shown = {**row, "spread": f"{row['p20']:.3g} - {row['p80']:.3g}" if row["p20"] is not None else ""}
    return [_cell(name, shown[name]) for name in columns]


def columns_of(variant: str) -> dict[str, str]:
    return LOGITS_COLUMNS if variant == "from logits" else COLUMNS


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if name == "share_of_limit":
        return f"{value:.0%}"
    if name.endswith("error"):
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write(folder: Path, facts: dict[str, Any], rows: Sequence[Row], absent: dict[str, str]) -> list[Path]:
    """Write JSON, Markdown and, where matplotlib is installed, a plot; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(facts)}.json"
    results = merge(path, facts, rows, absent)
    path.write_text(json.dumps(results, indent=1) + "\n")
    markdown = path.with_suffix(".md")
    files = [path, markdown]
    if find_spec("matplotlib"):
        files.append(plot(path.with_suffix(".svg"), results))
    markdown.write_text(as_markdown(results, files[2:]))
    return files


def as_markdown(results: dict[str, Any], pictures: Sequence[Path]) -> str:
    lines = [f"# Loss head on {results['hardware']}, {results['date']}", ""]
    if results["hardware"] == "CPU":
        lines += [f"**{ON_A_CPU}**", ""]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines += [f"`{results['command']}`", "", f"Versions: {versions}.", ""]
    lines += [f"Not measured: {name} ({reason})." for name, reason in results["absent"].items()]
    lines += ["", LEGEND, *(f"![time relative to the limit]({picture.name})" for picture in pictures)]
    for key, entries in tables(results).items():
        titles = list(columns_of(key[3]).values())
        lines += ["", f"## {title(key)}", ""]
        lines += ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in entries]
    return "\n".join(lines) + "\n"


def plot(path: Path, results: dict[str, Any]) -> Path:
    """Plot times over the time of the bare GEMMs, in a panel per number of rows; 1 is the limit."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    plain = {key: rows for key, rows in tables(results).items() if key[3] == "plain"}
    counts = sorted({key[1] for key in plain})
    heads = sorted(
        {r["head"] for rows in plain.values() for r in rows if r["tflops"]} - {LIMIT},
        key=lambda name: (not name.startswith("madpo"), name),
    )
    colours = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    figure = Figure(figsize=(9, 1 + 3.2 * max(1, len(counts))), layout="constrained")
    for axes, count in zip(figure.subplots(max(1, len(counts)), squeeze=False)[:, 0], counts, strict=False):
        shapes = [key for key in plain if key[1] == count]
        width = 0.85 / max(1, len(heads))
        for index, head in enumerate(heads):
            values = [_overhead(plain[key], head) for key in shapes]
            places = [x + (index - len(heads) / 2 + 0.5) * width for x in range(len(shapes))]
            axes.bar(places, values, width, label=head, color=colours[index])
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(shapes)), [key[0] for key in shapes])
        axes.set_ylabel("time / GEMMs alone")
        axes.set_title(f"{count} rows of policy and of reference", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"Loss head on {results['hardware']}, {results['date']}"
    figure.suptitle(title + (" (a CPU: means nothing)" if results["hardware"] == "CPU" else ""))
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)
    return path


def title(key: Key) -> str:
    return "{}, {} rows, {}, {}".format(*key)


def as_lines(results: dict[str, Any]) -> list[str]:
    """The tables as plain text."""
    lines: list[str] = []
    for key, entries in tables(results).items():
        titles = list(columns_of(key[3]).values())
        rows = [titles, *(cells(row) for row in entries if not row["refused"])]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", title(key)]
        for name, *numbers in rows:
            padded = (text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True))
            lines.append("  ".join([name.ljust(widths[0]), *padded]).rstrip())
        lines += [f"{row['head']}: {row['refused']}" for row in entries if row["refused"]]
    return [*lines, "", *([ON_A_CPU] if results["hardware"] == "CPU" else [])]


def _overhead(entries: Sequence[dict[str, Any]], head: str) -> float:
    """Time over the limit's; 0 where the head was not timed."""
    shares = [row["share_of_limit"] for row in entries if row["head"] == head and row["share_of_limit"]]
    return 1 / shares[0] if shares else 0.0
