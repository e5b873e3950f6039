"""`madpo bench`: run the loss head's benchmark, show it, write it down."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from madpo.benchmarks import head, results
from madpo.benchmarks.peers import available


def run_bench(
    shapes: Sequence[str],
    rows: Sequence[int],
    heads: Sequence[str],
    dtype: str,
    iterations: int | None,
    output: Path,
) -> None:
    """Raises ValueError for unknown names."""
    from rich.console import Console
    from rich.table import Table

    what = head.settings(shapes, rows, heads, dtype, iterations)
    console, log = Console(), Console(stderr=True)
    found = results.facts(shlex.join(["madpo", *sys.argv[1:]]), what.device)
    _, absent = available()
    for name, reason in absent.items():
        log.print(f"without {name}: {reason}", style="dim", markup=False)
    measured = []
    with log.status("starting") as status:
        for row in head.run(what, lambda text: status.update(text)):
            measured.append(row)
    for key, entries in results.tables(results.merge(Path("/nonexistent"), found, measured, absent)).items():
        table = Table(title="{}, {} rows, {}, {}".format(*key), title_justify="left", title_style="bold")
        for title in results.columns_of(key[3]).values():
            table.add_column(title, justify="left" if title == "head" else "right")
        for entry in entries:
            table.add_row(*results.cells(entry))
        console.print(table)
    if what.device.type != "cuda":
        console.print(results.ON_A_CPU, style="yellow", soft_wrap=True)
    for path in results.write(output, found, measured, absent):
        print(f"wrote {path}")
