"""`report.html`: charts and tables of one or several runs, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from madpo.trainer.counted import counted
from madpo.trainer.lives import in_short
from madpo.trainer.masking import masked_text
from madpo.trainer.pair_margins import ACCURACY, MARGIN, STDERR
from madpo.trainer.reports.drawing import PAPER, SOFT, Drawing, colour, draw, limits, running_mean
from madpo.trainer.reports.page import PALETTE, Figure, Key, Mark, Table, object_table, render, text
from madpo.trainer.reports.runs import (
    EVAL,
    Record,
    Run,
    data_warnings,
    difference,
    load_runs,
    what_happened,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEWEST_SMOOTHED = 30
"""Log lines from which on a running mean is drawn, over a fifteenth of them."""
STYLES: tuple[tuple[Any, Any], ...] = (("-", (0, (3, 1.5))), ((0, (5, 1, 1, 1)), (0, (1, 1))))
"""Line styles of a chart's first and second metric; the second row for runs beyond the palette."""
MARKS: tuple[tuple[Mark, Mark], ...] = (("solid", "dashed"), ("dashdot", "dotted"))


@dataclass(frozen=True)
class Chart:
    """A chart of the report; it is left out where no run has anything to show in it."""

    title: str
    note: str
    metrics: tuple[str, ...]  # the first is drawn solid, the second dashed
    guide: float | None = None  # value of a horizontal line
    shown: tuple[float, ...] = ()  # values that the axis always holds
    least_span: float = 0.0  # of the axis; what varies less looks flat
    band: tuple[str, str] | None = None  # metrics of the shaded range
    smoothed: bool = True
    idle: frozenset[float] = frozenset()  # the values of a metric that has nothing to show


REWARDS, WEIGHTS = ("rewards/chosen", "rewards/rejected"), ("madpo/weight_min", "madpo/weight_max")
SQUARED = "kl: half the squared log(policy / reference), mean over the data's tokens, rejected ones too"
CHARTS = (
    Chart("Loss", "mean of the objective", ("loss",), least_span=0.05),
    Chart("Perplexity", "exp of the mean loss of a token", ("perplexity",), least_span=0.5),
    Chart("Accuracy", "share of pairs ranked as labelled", (ACCURACY,), 0.5, shown=(0.4, 0.7)),
    Chart("Margin", "reward of chosen minus reward of rejected", (MARGIN,), 0.0, shown=(-0.02, 0.1)),
    Chart("Rewards", "β · log(policy / reference) of the completions", REWARDS, 0.0, shown=(-0.1, 0.1)),
    Chart("MADPO weights", "mean and range; 1 is DPO", ("madpo/weight_mean",), 1.0, (0.8, 1.2), band=WEIGHTS),
    Chart("Squared log-ratio", SQUARED, ("kl",), shown=(0.0, 0.001)),
    Chart(
        "Length bias", "correlation of reward and length", ("rewards/length_correlation",), 0.0, (-0.5, 0.5)
    ),
    Chart(
        "Throughput", "tokens per second on all devices together", ("perf/tokens_per_second",), shown=(0.0,)
    ),
    Chart("Utilisation", "model FLOPs as a share of the devices' peak", ("perf/mfu",), shown=(0.0,)),
    Chart(
        "Imbalance",
        "busiest rank's work over the mean; 1 is none",
        ("perf/imbalance",),
        1.0,
        (1.0, 1.2),
        idle=frozenset({1.0}),  # a rank alone
    ),
    Chart("Learning rate", "by the schedule", ("learning_rate",), shown=(0.0,), smoothed=False),
    Chart("Gradient norm", "before clipping", ("grad_norm",), shown=(0.0,)),
)


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write a report with all runs on the same charts, and return its path.

    Raises UserError if a run's metrics are missing, a file cannot be read, or a run is named twice.
    """
    loaded = load_runs(runs)
    alone = len(loaded) == 1
    return render(
        "run_report.html.jinja",
        output,
        title=" · ".join(run.name for run in loaded),
        happened=[("" if alone else run.name, _sentence(what_happened(run))) for run in loaded],
        warnings=data_warnings(loaded),
        overview=[_overview(loaded), *_differences(loaded)],
        figures=[figure for chart in CHARTS if (figure := _figure(chart, loaded))],
        numbers=[
            object_table(title, {run.name: _with_errors(run.final(evaluation)) for run in loaded})
            for title, evaluation in (("Training", False), ("Held out", True))
        ],
        details=[_details(run) for run in loaded],
    )


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _overview(runs: Sequence[Run]) -> Table:
    """The runs, how long they took, and their last held-out values."""
    measured = [
        name for name in (ACCURACY, MARGIN, "loss") if any(run.series(EVAL + name)[1] for run in runs)
    ]
    rows = []
    for run in runs:
        final, held_out, (_, times) = run.final(False), run.final(True), run.series("time")
        begun = min(run.facts.get("started", times[0]), times[0]) if times else 0
        wall = str(timedelta(seconds=round(times[-1] - begun))) if times else ""
        numbers = [text(final.get(name)) for name in ("step", "epoch", "num_tokens")]
        values = [_with_error(held_out.get(EVAL + x), held_out.get(EVAL + x + STDERR)) for x in measured]
        rows.append([Key("solid", run.number, run.name), *numbers, wall, *values])
    titles = {ACCURACY: "held-out accuracy", MARGIN: "margin", "loss": "held-out loss"}
    counts = [run.final(True).get("eval_num_pairs") for run in runs]
    note = f"± is one standard error, over {counted(int(counts[0]), 'held-out pair')}." if counts[0] else ""
    head = ["run", "steps", "epochs", "tokens", "wall time", *(titles[name] for name in measured)]
    return Table(head, rows, note=note if len(set(counts)) == 1 else "± is one standard error." * any(counts))


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _with_errors(record: Record) -> dict[str, Any]:
    """The record with each standard error behind its metric instead of in a row of its own."""
    shown: dict[str, Any] = {name: value for name, value in record.items() if not name.endswith(STDERR)}
    for name in shown:
        if (error := record.get(name + STDERR)) is not None:
            shown[name] = f"{text(shown[name])} ± {text(error)}"
    return shown


def _differences(runs: Sequence[Run]) -> list[Table]:
    """A table of each other run's difference to the first one at their last evaluations; [] without any."""
    first, rows = runs[0], []
    for run in runs[1:]:
        both = [difference(first, run, metric) for metric in (ACCURACY, MARGIN)]
        if any(both):
            cells = [
                "" if x is None else f"{'+' * (x.mean >= 0)}{_with_error(x.mean, x.standard_error)}"
                for x in both
            ]
            counts = {x.pairs for x in both if x}
            how = f"pair by pair, {count:,}" if (count := counts.pop()) else "unpaired"
            rows.append([Key("solid", run.number, run.name), *cells, how])
    note = (
        "Pair by pair: the standard error is that of the differences of the same pairs. Unpaired: that of "
        "two independent samples, which is too large if the runs share their pairs. Margins compare only "
        "between runs whose β means the same."
    )
    head = ["run", "held-out accuracy", "margin", "compared"]
    return [Table(head, rows, f"Difference to {first.name}", note)] if rows else []


def _details(run: Run) -> dict[str, Any]:
    """A run's command, hardware, data and configuration."""
    facts = {"command": "", **{name: value for name, value in run.facts.items() if value not in (None, [])}}
    command = masked_text(str(facts.pop("command")))
    if "started" in facts:
        facts["started"] = f"{datetime.fromtimestamp(facts['started'], UTC):%Y-%m-%d %H:%M} UTC"
    if run.lives:
        facts["starts"] = in_short(run.lives, run.is_training)
    if run.effective_time is not None:
        kept, whole = run.effective_time
        facts["effective training time"] = f"{kept / whole:.0%} of {timedelta(seconds=round(whole))}"
    by_split = all(isinstance(value, dict) for value in run.data.values())
    columns = run.data if by_split else {"": run.data}
    counts = {split: {x: y for x, y in facts.items() if x != "where"} for split, facts in columns.items()}
    data = object_table("Data", counts)
    tables = [object_table("Environment", {"": facts}), data]
    return {"name": run.name, "command": command, "tables": tables, "config": run.config or "not recorded"}


def _figure(chart: Chart, runs: Sequence[Run]) -> Figure | None:
    """The chart; None if no run has its metrics, or none has anything to show."""
    names = [*chart.metrics, *(EVAL + metric for metric in chart.metrics)]
    having = [run for run in runs if any(run.series(metric)[0] for metric in names)]
    if not having or all(chart.idle == {*run.series(chart.metrics[0])[1]} for run in having):
        return None
    with draw(chart.title) as drawing:
        _draw_axes(drawing.axes, chart, having)
        for run in having:
            _draw_run(drawing, chart, run, alone=len(runs) == 1)
    keys = _legend(chart, having, len(runs) == 1)
    return Figure(chart.title, chart.note, keys, drawing.svg, drawing.values)


def _draw_axes(axes: Axes, chart: Chart, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step", color=SOFT)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if chart.guide is not None:
        axes.axhline(chart.guide, color=SOFT, linewidth=0.7, linestyle=(0, (2, 2)))
    metrics = [*chart.metrics, *(chart.band or ())]
    names = [*metrics, *(EVAL + metric for metric in metrics)]
    values = [value for run in runs for name in names for value in run.series(name)[1]]
    if found := limits(values, chart.shown, chart.least_span):
        axes.set_ylim(*found)


def _draw_run(drawing: Drawing, chart: Chart, run: Run, alone: bool) -> None:
    axes, own = drawing.axes, colour(run.number)
    if chart.band:
        steps, low, high = run.series(*chart.band)
        axes.fill_between(steps, low, high, color=own, alpha=0.13, linewidth=0)
    styles = STYLES[run.number // len(PALETTE) % len(STYLES)]
    for metric, style, hollow in zip(chart.metrics, styles, (False, True), strict=False):
        label = metric.rpartition("/")[2] if len(chart.metrics) > 1 else "training"
        label = label if alone else run.name if len(chart.metrics) == 1 else f"{run.name}, {label}"
        steps, values = run.series(metric)
        window = _window(chart, steps)
        marker = "." if len(steps) == 1 else ""
        axes.plot(
            steps,
            values,
            color=own,
            linestyle=style,
            marker=marker,
            linewidth=0.8 if window else 1.3,
            alpha=0.3 if window else 1,
        )
        drawing.answer(label, run.number, steps, values)
        if window:
            smooth = running_mean(np.array(values), window)
            axes.plot(steps, smooth, color=own, linestyle=style, linewidth=1.5)
        _draw_held_out(drawing, EVAL + metric, run, hollow, f"{label}, held out" if not alone else "held out")


def _draw_held_out(drawing: Drawing, metric: str, run: Run, hollow: bool, label: str) -> None:
    """Dots, with bars of one standard error where the run noted them."""
    own = colour(run.number)
    steps, values, errors = run.series(metric, metric + STDERR)
    drawing.axes.errorbar(steps, values, errors, color=own, fmt="none", elinewidth=1.3, zorder=2.5)
    steps, values = run.series(metric)
    fill, edge = (PAPER, own) if hollow else (own, PAPER)
    drawing.axes.plot(
        steps, values, "o", color=fill, markeredgecolor=edge, markersize=5.5, zorder=3, clip_on=False
    )
    drawing.answer(label, run.number, steps, values)


def _window(chart: Chart, steps: Sequence[float]) -> int:
    """Log lines that the running mean is over, an odd number; 0 for no running mean."""
    return len(steps) // 30 * 2 + 1 if chart.smoothed and len(steps) >= FEWEST_SMOOTHED else 0


def _legend(chart: Chart, runs: Sequence[Run], alone: bool) -> list[Key]:
    """Colours of the runs, and line styles within a run; none if there is one curve."""
    evaluated = any(run.series(EVAL + metric)[0] for run in runs for metric in chart.metrics)
    tint: Any = runs[0].number if alone else "soft"
    rows = [MARKS[run.number // len(PALETTE) % len(MARKS)] for run in runs]
    keys = [] if alone else [Key(row[0], run.number, run.name) for run, row in zip(runs, rows, strict=True)]
    windows = {_window(chart, run.series(chart.metrics[0])[0]) for run in runs} - {0}
    if len(chart.metrics) > 1:
        marks = zip(MARKS[0], chart.metrics, strict=True)
        keys += [Key(mark, tint, metric.rpartition("/")[2]) for mark, metric in marks]
    elif alone and (evaluated or windows):
        keys.append(Key("solid", tint, "training"))
    if windows:
        lines = f"{windows.pop()}" if len(windows) == 1 else "a fifteenth of them"
        keys.append(Key("faint", tint, f"log lines (strong: running mean of {lines})"))
    return [*keys, Key("dot", tint, "held out")] if evaluated else keys
