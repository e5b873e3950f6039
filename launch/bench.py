"""`madpo bench` and `madpo bench step`: run a benchmark, print and write its results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from madpo.benchmarks.step import run as step


def run_bench(
    shapes: Sequence[str],
    rows: Sequence[int],
    heads: Sequence[str],
    dtype: str,
    iterations: int | None,
    output: Path,
    everything: bool = False,
    variants: bool = True,
) -> None:
    """Measure the loss heads. Raises UserError for unknown names."""
    from rich.console import Console
    from rich.table import Table

    from madpo.benchmarks.head import report as head_report
    from madpo.benchmarks.head import run as head
    from madpo.benchmarks.head.peers import available

    settings = head.make_settings(shapes, rows, heads, dtype, iterations, everything, variants)
    console, log = Console(), Console(stderr=True)
    versions, absent = available()
    for note in head.notes(settings, versions, absent):
        log.print(note, style="dim", markup=False)
    with log.status("starting") as status:
        command = shlex.join(["madpo", *sys.argv[1:]])
        results, paths = head.record(settings, command, output, absent, status.update)
    for key, entries in head_report.tables(results).items():
        table = Table(title=head_report.title(key), title_justify="left", title_style="bold")
        for title in head_report.columns_of(key[3]).values():
            table.add_column(title, justify="left" if title == "head" else "right")
        for entry in entries:
            table.add_row(*head_report.cells(entry))
        console.print(table)
    if settings.device.type != "cuda":
        console.print(head_report.ON_A_CPU, style="yellow", soft_wrap=True)
    for path in paths:
        print(f"wrote {path}")


def run_step_bench(settings: step.Settings, output: Path) -> None:
    """Measure training steps. Raises UserError for a contender that cannot run."""
    from rich.console import Console
    from rich.table import Table

    from madpo.benchmarks.step import report as step_report
    from madpo.benchmarks.step import run as step

    console, log = Console(), Console(stderr=True)
    facts = step_report.facts(shlex.join(["madpo", *sys.argv[1:]]))
    rows, paths = list[step.Row](), list[Path]()
    with TemporaryDirectory() as folder, log.status("starting") as status:
        for rows in step.run(settings, Path(folder), status.update):
            paths = step_report.write(output, facts, rows)
    entries, refused = [asdict(row) for row in rows if not row.refused], [row for row in rows if row.refused]
    table = Table(title=step_report.title(asdict(rows[0])), title_justify="left", title_style="bold")
    columns = step_report.that_fit(entries, console.width)
    for title in columns.values():
        is_name = title == "contender"
        table.add_column(title, justify="left" if is_name else "right", no_wrap=not is_name)
    for entry in entries:
        table.add_row(*step_report.cells(entry, columns))
    console.print(table)
    for row in refused:
        console.print(f"{row.contender}: {row.refused}", soft_wrap=True, markup=False)
    for path in paths:
        print(f"wrote {path}")


def run_scaling(model: str, iterations: int, output: Path) -> None:
    """Measure how time and memory grow with tokens and pairs. Raises UserError for an unknown model."""
    from rich.console import Console
    from rich.table import Table

    from madpo.benchmarks.step import scaling as step_scaling

    console, log = Console(), Console(stderr=True)
    facts = step_scaling.facts(shlex.join(["madpo", *sys.argv[1:]]))
    with TemporaryDirectory() as folder, log.status("starting") as status:
        # Memory first: what the time measurements leave with the process would hide new memory.
        memory = list(step_scaling.memory(model, status.update))
        time = list(step_scaling.times(Path(folder), model, iterations, status.update))
    for titles, *lines in step_scaling.tables(time, memory):
        table = Table()
        for title in titles:
            table.add_column(title, justify="right")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for path in step_scaling.write(output, facts, time, memory):
        print(f"wrote {path}")
