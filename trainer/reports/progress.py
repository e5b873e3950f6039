"""What rank 0 prints: lines, below them a bar on a terminal; tables of metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from madpo.trainer.checkpoints.folders import newest_checkpoint, step_of
from madpo.trainer.config.schema import Config
from madpo.trainer.counted import counted
from madpo.trainer.data.report import Report, findings
from madpo.trainer.dist import Shard
from madpo.trainer.pair_margins import ACCURACY, STDERR, all_are_ties
from madpo.trainer.state import TrainState

SHORT = {
    "loss": ("loss", ".4f"),
    "rewards/accuracies": ("acc", ".3f"),
    "rewards/chosen": ("chosen", ".3f"),
    "rewards/rejected": ("rejected", ".3f"),
    "rewards/margins": ("margin", ".3f"),
    "madpo/weight_mean": ("weight", ".3f"),
    "kl": ("kl", ".4f"),
    "grad_norm": ("grad", ".2f"),
    "perf/tokens_per_second": ("tok/s", ",.0f"),
    "perf/mfu": ("mfu", ".1%"),
}
"""Metrics on the progress line: name -> (label, format)."""

OF_LABELLED = ("rewards/chosen", "rewards/rejected")
"""Metrics that the line has of labelled completions alone, which have no accuracy; pairs have margins."""


MERGE_HINT = 0.1
"""Share of repeated prompt tokens above which `data.merge_prompts` is suggested."""


class Progress:
    """Prints the start of one run and its progress."""

    def __init__(self, total_steps: int) -> None:
        self._console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._total = total_steps
        self._clock: tuple[float, int] | None = None
        self._live: RichProgress | None = None

    def announce(
        self,
        config: Config,
        report: dict[str, Any],
        state: TrainState,
        shard: Shard,
        device: torch.device,
        parameters: tuple[int, int],  # trained, all
        notes: Sequence[str] = (),
    ) -> None:
        """Print what a user should know before the first step; `notes` are printed a line each."""
        out = self._console.print
        ranks, place = counted(shard.world_size, "rank"), escape(config.output_dir)
        out(f"[bold]{config.objective.loss_type}[/] on {ranks} ({device.type}), into {place}")
        trained, total = parameters
        out(f"  training {trained:,} of {total:,} parameters ({trained / total:.2%})")
        for split, facts in report.items():
            counts = [f"{counted(facts['groups'], 'group')}, {counted(facts['tokens'], 'token')}"]
            if "rows_merged" in facts:
                rows = counted(facts["rows_merged"], "example")
                saved = counted(facts["tokens_saved_by_merging"], "token")
                counts.append(f"{rows} merged by prompt, {saved} saved")
            repeated = facts.get("tokens_of_known_prompts", 0) / max(facts["tokens"], 1)
            could_merge = not (config.data.merge_prompts or config.bound_objective.supervised)
            if could_merge and repeated > MERGE_HINT:
                counts.append(f"{repeated:.0%} of the tokens repeat a prompt (see data.merge_prompts)")
            out(f"  {split}: {', '.join(counts)}")
            for finding in findings(facts):
                out(f"    {finding}", markup=False)
        for note in notes:
            out(f"  {note}", markup=False)
        if state.step:
            out(f"  resuming after step {state.step} of {self._total}")
        if self._console.is_terminal and state.step < self._total:
            self._live = RichProgress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._live.start()
            self._live.add_task("", total=self._total, completed=state.step)

    def show(self, record: Mapping[str, float]) -> None:
        """Print a logged record, a line each; on a terminal they pass above the bar."""
        step = int(record["step"])
        if "eval_loss" in record:
            text = "  ".join(_short(record, "eval_"))
            self._console.print(f"step {step}/{self._total}  held out: {text}")
            return
        text = "  ".join(_short(record))
        if self._live is not None:
            self._live.update(self._live.task_ids[0], completed=step)
        remaining = self._remaining(step) if self._live is None else ""
        self._console.print(f"step {step}/{self._total}  {text}  {remaining}".rstrip())

    def _remaining(self, step: int) -> str:
        """`eta m:ss`, extrapolated from the first record on; empty at the first."""
        now = time.monotonic()
        if self._clock is None:
            self._clock = (now, step)
            return ""
        seconds = (now - self._clock[0]) / (step - self._clock[1]) * (self._total - step)
        return f"eta {int(seconds) // 60}:{int(seconds) % 60:02d}"

    def stopped(self, state: TrainState, checkpoints: Path) -> str:
        """The answer to a signal: how far the run is, and from where it goes on."""
        self.close()
        newest = newest_checkpoint(checkpoints)
        way_on = (
            f"the last checkpoint is of step {step_of(newest.name)}; the same command continues from there"
            if newest
            else "no checkpoint yet (train.save_steps), so the same command starts from step 0"
        )
        return f"stopped at step {state.step} of {self._total}; {way_on}"

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def _short(record: Mapping[str, float], prefix: str = "") -> list[str]:
    parts, has_accuracy = [], prefix + ACCURACY in record
    for name, (label, form) in SHORT.items():
        if (value := record.get(prefix + name)) is None or (name in OF_LABELLED and has_accuracy):
            continue
        if name == ACCURACY and all_are_ties(record, prefix):
            parts.append(f"{label} -")
            continue
        error = record.get(f"{prefix}{name}{STDERR}")
        parts.append(f"{label} {value:{form}}" + ("" if error is None else f" ± {error:{form}}"))
    return parts


def metrics_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """A text table with a row per metric and its standard error, and a column per model."""
    table = Table("metric", *columns, box=None, pad_edge=False)
    names = dict.fromkeys(name for record in columns.values() for name in record)
    for name in names:
        if not name.endswith(STDERR):
            table.add_row(name, *(metric_cell(record, name) for record in columns.values()))
    console = Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def metric_cell(record: Mapping[str, float], name: str) -> str:
    """A metric and its standard error as text; empty if it is missing, `-` if all pairs are ties."""
    value, error = record.get(name), record.get(f"{name}{STDERR}")
    if value is None:
        return ""
    if name.endswith(ACCURACY) and all_are_ties(record, name.removesuffix(ACCURACY)):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


SECONDS_BETWEEN_LINES = 30
"""How often a long stage prints a line."""


def print_findings(reports: Mapping[str, Report]) -> None:
    """Print what was dropped, cut or is odd in each split, for stages that announce no training."""
    for split, report in reports.items():
        for finding in findings(report):
            print_line(f"{split}: {finding}")


def print_line(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(text, markup=False)
