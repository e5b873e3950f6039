"""`report.html`: charts and tables of one or several runs, in one file that needs no network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from madpo.trainer.errors import UserError
from madpo.trainer.reports.html import COLOURS, CSS, GREY, key, require_matplotlib, svg, table, text
from madpo.trainer.run_folder import METRICS, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EVAL = "eval_"


@dataclass(frozen=True)
class Chart:
    """A chart of the report; it is left out if no run has one of its metrics."""

    title: str
    note: str
    metrics: tuple[str, ...]  # the first is drawn solid, the second dashed
    guide: float | None = None  # value of a horizontal line
    limits: tuple[float, float] | None = None
    band: tuple[str, str] | None = None  # metrics of the shaded range


REWARDS, WEIGHTS = ("rewards/chosen", "rewards/rejected"), ("madpo/weight_min", "madpo/weight_max")
CHARTS = (
    Chart("Loss", "mean of the objective", ("loss",)),
    Chart("Accuracy", "share of pairs ranked as labelled", ("rewards/accuracies",), 0.5, (0, 1)),
    Chart("Margin", "reward of chosen minus reward of rejected", ("rewards/margins",), 0.0),
    Chart("Rewards", "β · log(policy / reference) of the completions", REWARDS, 0.0),
    Chart("MADPO weights", "mean and range; 1 is DPO", ("madpo/weight_mean",), 1.0, band=WEIGHTS),
    Chart("KL", "estimated distance from the reference, per token", ("kl",)),
    Chart("Length bias", "correlation of reward and length", ("rewards/length_correlation",), 0.0),
    Chart("Throughput", "tokens per second on all devices together", ("perf/tokens_per_second",)),
    Chart("Utilisation", "model FLOPs as a share of the devices' peak", ("perf/mfu",)),
    Chart("Imbalance", "busiest rank's work over the mean; 1 is none", ("perf/imbalance",), 1.0),
    Chart("Learning rate", "by the schedule", ("learning_rate",)),
    Chart("Gradient norm", "before clipping", ("grad_norm",)),
)


@dataclass(frozen=True)
class Run:
    """The contents of a run folder that the report shows."""

    name: str
    colour: str
    records: list[dict[str, float]]
    config: str
    data: dict[str, Any]
    facts: dict[str, Any]

    def series(self, *metrics: str) -> list[list[float]]:
        """The steps, then the values of each metric, from the records that have all of these metrics."""
        names = ("step", *metrics)
        rows = [record for record in self.records if all(name in record for name in names)]
        return [[row[name] for row in rows] for name in names]

    def final(self, evaluation: bool) -> dict[str, float]:
        """The last value of every metric of training, or of evaluation; without the time."""
        last = {name: value for record in self.records for name, value in record.items()}
        names = (name for name in last if name.startswith(EVAL) == evaluation and name != "time")
        return {name: last[name] for name in names}


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Write a report with all runs on the same charts, and return its path.

    Raises UserError if matplotlib or a run's metrics are missing, or a file cannot be read.
    """
    require_matplotlib()
    loaded = _load_runs(runs)
    page = PAGE.format(
        title=escape(" · ".join(run.name for run in loaded)),
        css=CSS,
        facts=_facts_table(loaded),
        figures="".join(_figure(chart, loaded) for chart in CHARTS),
        numbers="".join(
            _object_table(title, {run.name: run.final(evaluation) for run in loaded})
            for title, evaluation in (("Training", False), ("Held out", True))
        ),
        details="".join(_details(run) for run in loaded),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def _load_runs(folders: Sequence[Path]) -> list[Run]:
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = []
    for name, folder, colour in zip(names, folders, cycle(COLOURS), strict=False):
        records = read_metrics(folder)
        if not records:
            where = folder / METRICS
            raise UserError(f"{where}: no metrics; name the folder of a run that has logged a step")
        path = folder / "config.yaml"
        config = path.read_text(encoding="utf-8") if path.is_file() else ""
        data, facts = (_read_object(folder / file) for file in ("data_report.json", "run.json"))
        runs.append(Run(name, colour, records, config, data, facts))
    return runs


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: {error}; mend or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; mend or remove it")
    return content


def _figure(chart: Chart, runs: Sequence[Run]) -> str:
    """The chart as HTML; empty if no run has its metrics."""
    shown = [*chart.metrics, *(EVAL + metric for metric in chart.metrics)]
    having = [run for run in runs if any(run.series(metric)[0] for metric in shown)]
    if not having:
        return ""
    legend, drawing = _legend(chart, having, len(runs) == 1), _svg(chart, having)
    return f"<figure><h3>{chart.title}</h3><p>{chart.note}</p><p>{legend}</p>{drawing}</figure>\n"


def _legend(chart: Chart, runs: Sequence[Run], alone: bool) -> str:
    """The legend: colours of the runs, and line styles within a run; empty if there is one curve."""
    evaluated = any(run.series(EVAL + metric)[0] for run in runs for metric in chart.metrics)
    colour = runs[0].colour if alone else GREY
    keys = [] if alone else [key("solid", run.colour, run.name) for run in runs]
    if len(chart.metrics) > 1:
        marks = zip(("solid", "dashed"), chart.metrics, strict=True)
        keys += [key(mark, colour, metric.rpartition("/")[2]) for mark, metric in marks]
    elif alone and evaluated:
        keys.append(key("solid", colour, "training"))
    return "".join([*keys, key("dot", colour, "held out")] if evaluated else keys)


def _svg(chart: Chart, runs: Sequence[Run]) -> str:
    from matplotlib.ticker import MaxNLocator

    with svg(chart.title) as (axes, drawing):
        axes.set_xlabel("step", color=GREY)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if chart.guide is not None:
            axes.axhline(chart.guide, color=GREY, linewidth=0.7, linestyle=(0, (2, 2)))
        for run in runs:
            _draw(axes, chart, run)
        axes.set_ylim(chart.limits)
    return drawing.getvalue()


def _draw(axes: Axes, chart: Chart, run: Run) -> None:
    if chart.band:
        steps, low, high = run.series(*chart.band)
        axes.fill_between(steps, low, high, color=run.colour, alpha=0.13, linewidth=0)
    for metric, dashed in zip(chart.metrics, (False, True), strict=False):
        steps, values = run.series(metric)
        line, marker = (0, (3, 1.5)) if dashed else "-", "." if len(steps) == 1 else ""
        axes.plot(steps, values, color=run.colour, linestyle=line, marker=marker, linewidth=1.3)
        steps, values = run.series(EVAL + metric)
        fill, edge = ("white", run.colour) if dashed else (run.colour, "white")
        axes.plot(steps, values, "o", color=fill, markeredgecolor=edge, markersize=6.5, zorder=3)


def _facts_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        final, (_, times) = run.final(evaluation=False), run.series("time")
        begun = min(run.facts.get("started", times[0]), times[0]) if times else 0
        wall = str(timedelta(seconds=round(times[-1] - begun))) if times else ""
        numbers = [text(final.get(name)) for name in ("step", "epoch", "num_tokens")]
        rows.append([key("solid", run.colour, run.name), *numbers, wall])
    return table(["run", "steps", "epochs", "tokens", "wall time"], rows)


def _details(run: Run) -> str:
    """A run's command, hardware, data and configuration."""
    facts = {"command": "", **run.facts}
    command = escape(str(facts.pop("command")))
    if "started" in facts:
        facts["started"] = f"{datetime.fromtimestamp(facts['started'], UTC):%Y-%m-%d %H:%M} UTC"
    by_split = all(isinstance(value, dict) for value in run.data.values())
    tables = {"Environment": {"": facts}, "Data": run.data if by_split else {"": run.data}}
    return f"""<h2>{escape(run.name)}</h2>
{f"<h3>To repeat this run</h3><pre>{command}</pre>" if command else ""}
<div class="side">{"".join(_object_table(title, columns) for title, columns in tables.items())}</div>
<details><summary>Configuration</summary><pre>{escape(run.config or "not recorded")}</pre></details>
"""


def _object_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A titled table with a row per name and a column per object; nested objects are flattened."""
    flat = [_flatten(column) for column in columns.values()]
    names = dict.fromkeys(name for column in flat for name in column)
    rows = [[escape(name), *(text(column.get(name)) for column in flat)] for name in names]
    return f"<div><h3>{title}</h3>{table(['', *map(escape, columns)], rows)}</div>" if rows else ""


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for inner, value in nested.items():
        name = prefix + inner
        flat |= _flatten(value, f"{name}: ") if isinstance(value, dict) else {name: value}
    return flat


PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training report: {title}</title><style>{css}</style>
<p>Training report</p><h1>{title}</h1>{facts}
<div class="grid">{figures}</div>
<h2>Final numbers</h2><div class="side">{numbers}</div>
{details}</html>
"""
