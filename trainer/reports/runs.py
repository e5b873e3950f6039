"""Run folders as a report sees them: records, names that stay apart, what happened, how runs differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from madpo.trainer import lives
from madpo.trainer.config import strict_yaml
from madpo.trainer.errors import UserError, nearest
from madpo.trainer.files import check_path, read_object
from madpo.trainer.lives import Life, effective_time
from madpo.trainer.masking import masked, masked_text
from madpo.trainer.pair_margins import (
    ACCURACY,
    STDERR,
    StoredPairs,
    all_are_ties,
    read_pairs,
    standard_error,
)
from madpo.trainer.run_folder import METRICS, is_training, read_metrics

EVAL = "eval_"
Record = dict[str, float]


@dataclass(frozen=True)
class Run:
    """The contents of a run folder that the report shows."""

    name: str
    number: int  # among the runs of the report; gives its colour
    records: list[Record]
    config: str
    data: dict[str, Any]
    facts: dict[str, Any]
    pairs: StoredPairs | None
    is_training: bool
    lives: list[Life]  # its starts

    def series(self, *metrics: str) -> list[list[float]]:
        """The steps, then the values of each metric, from the records that have all of these metrics."""
        names = ("step", *metrics)
        rows = [record for record in self.records if all(name in record for name in names)]
        return [[row[name] for row in rows] for name in names]

    def final(self, evaluation: bool) -> Record:
        """The last value of every metric of training, or of evaluation; without the time."""
        last = {name: value for record in self.records for name, value in record.items()}
        names = (name for name in last if name.startswith(EVAL) == evaluation and name != "time")
        return {name: last[name] for name in names}

    @property
    def effective_time(self) -> tuple[float, float] | None:
        """Seconds that went into steps which are kept, and those since the first start; None if not known."""
        return effective_time(self.lives, [record for record in self.records if "perf/step_time" in record])

    @property
    def evaluations(self) -> list[Record]:
        return [record for record in self.records if "eval_loss" in record]

    @property
    def step(self) -> int:
        return int(max(record["step"] for record in self.records))

    @property
    def total_steps(self) -> int | None:
        """The steps of the whole run; None for runs that did not note it."""
        return self.facts.get("total_steps")

    @property
    def state(self) -> str:
        """Whether it runs, has finished or was stopped; empty if nothing says so."""
        if self.is_training:
            return "running"
        if self.total_steps is None:
            return ""
        return "finished" if self.step >= self.total_steps else "stopped"


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders. Raises UserError for one without metrics or with a broken file."""
    for folder in folders:
        check_path(folder)
    return [
        _load_run(name, number, folder)
        for number, (name, folder) in enumerate(zip(short_names(folders), folders, strict=True))
    ]


def _folders_beside(folder: Path) -> list[str]:
    parent = folder.parent
    return [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []


def _load_run(name: str, number: int, folder: Path) -> Run:
    records = read_metrics(folder)
    if not records:
        where = folder / METRICS
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder{nearest(folder.name, _folders_beside(folder))}")
        raise UserError(f"{where}: no metrics; name the folder of a run that has logged a step")
    path = folder / "config.yaml"
    config = _masked_config(path.read_text(encoding="utf-8")) if path.is_file() else ""
    data, facts = (read_object(folder / file) for file in ("data_report.json", "run.json"))
    _check_numbers(folder / "run.json", {key: facts[key] for key in NUMBERS if facts.get(key) is not None})
    for record in records:
        _check_numbers(folder / METRICS, record)
    supervised = _loss_type(config) == "nll"
    records = [_as_shown(record, supervised) for record in records]
    begun = lives.read(folder)
    return Run(name, number, records, config, data, facts, read_pairs(folder), is_training(folder), begun)


def short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other one shares. Raises UserError for a folder named twice."""
    parts = [folder.resolve().parts for folder in folders]
    if twice := next(
        (folder for folder, own in zip(folders, parts, strict=True) if parts.count(own) > 1), None
    ):
        raise UserError(f"{twice}: named twice; a report shows each run once")

    def unique_end(own: tuple[str, ...]) -> str:
        for length in range(1, len(own) + 1):
            if sum(other[-length:] == own[-length:] for other in parts) == 1:
                return "/".join(own[-length:])
        return "/".join(own)  # the end of another one's path

    return [unique_end(own) for own in parts]


def _masked_config(text: str) -> str:
    """The text of a config without secrets, which runs of earlier versions have kept."""
    try:
        tree = strict_yaml.parse(text, "")
    except UserError:
        return masked_text(text)
    return text if masked(tree) == tree else strict_yaml.dump(masked(tree))


NUMBERS = ("total_steps", "started")
"""The numbers in run.json."""
LATEST = 1e11
"""No time of a run is later, in seconds since 1970."""


def _check_numbers(path: Path, values: dict[str, Any]) -> None:
    """Raise UserError for a value that is no number, or for a time that is none."""
    for name, value in values.items():
        is_number = isinstance(value, int | float)
        is_time = name in ("time", "started")
        if not is_number or (is_time and not 0 <= value < LATEST):
            what = "seconds since 1970" if is_time else "a number"
            step = f" at step {values['step']}" if "step" in values and name != "step" else ""
            raise UserError(f"{path}: {name}{step}: expected {what}, got {value!r:.80}; mend or remove it")


def _loss_type(config: str) -> str | None:
    try:
        return yaml.safe_load(config)["objective"]["loss_type"]
    except (yaml.YAMLError, KeyError, TypeError):
        return None


def _as_shown(record: Record, supervised: bool) -> Record:
    """The record without an accuracy that only counts ties, and with the perplexity if it is supervised."""
    shown = dict(record)
    for prefix in ("", EVAL):
        if prefix + ACCURACY in shown and all_are_ties(shown, prefix):
            del shown[prefix + ACCURACY]
            shown.pop(prefix + ACCURACY + STDERR, None)
        if supervised and prefix + "loss" in shown:
            shown[prefix + "perplexity"] = math.exp(min(shown[prefix + "loss"], 700.0))
    return shown


def what_happened(run: Run) -> str:
    """One sentence: what the held-out values did, how far the run is, how it ended."""
    parts = []
    metric, form = _headline_metric(run)
    steps, values = run.series(metric)
    if values:
        name = metric.replace(EVAL, "held-out ").replace(ACCURACY, "accuracy")
        first = f"{form(values[0])} (step {int(steps[0])}) → " if len(values) > 1 else ""
        course = f"{first}{form(values[-1])}"
        error = run.final(True).get(metric + STDERR)
        course += f" ± {100 * error:.1f}" if error is not None else ""
        of = f" of {run.total_steps}" if run.total_steps else ""
        best = _best(run, metric, form) if len(values) > 1 else ""
        parts.append(f"{name} {course} at step {int(steps[-1])}{of}{best}")
    loss = f"{EVAL}loss" if run.evaluations else "loss"
    if loss != metric and (values := run.series(loss)[1]):
        course = f"{values[0]:.3f} → {values[-1]:.3f}" if len(values) > 1 else f"{values[-1]:.3f}"
        parts.append(f"{loss.replace(EVAL, 'held-out ')} {course}")
    state = run.state
    if state in ("running", "stopped"):
        state += f" at step {run.step}" + (f" of {run.total_steps}" if run.total_steps else "")
    return "; ".join([*parts, *([state] if state else [])])


def _headline_metric(run: Run) -> tuple[str, Any]:
    """The metric that says best what a run did, and how its values are written."""
    for metric in (EVAL + ACCURACY, ACCURACY):
        if run.series(metric)[1]:
            return metric, "{:.1%}".format
    for metric in (f"{EVAL}perplexity", "perplexity"):
        if run.series(metric)[1]:
            return metric, "{:.2f}".format
    return f"{EVAL}loss" if run.evaluations else "loss", "{:.4f}".format


def _best(run: Run, metric: str, form: Any) -> str:
    """The best held-out value, where that is not the last one."""
    if not metric.startswith(EVAL):
        return ""
    steps, values = run.series(metric)
    best = (max if metric.endswith(ACCURACY) else min)(values)
    return "" if values[-1] == best else f" (best {form(best)} at step {int(steps[values.index(best)])})"


@dataclass(frozen=True)
class Difference:
    """The difference of a held-out mean between two runs, the second less the first."""

    mean: float
    standard_error: float | None  # None for runs that did not note their own
    pairs: int | None  # if both runs have the same held-out pairs: so many were compared one by one


def difference(first: Run, second: Run, metric: str) -> Difference | None:
    """The difference at the last evaluation; None if a run has no such value.

    Pair by pair if both have the margins of the same pairs, which leaves out how hard the pairs are.
    Otherwise as if the pairs were independent draws.
    """
    own, other = first.final(True), second.final(True)
    if EVAL + metric not in own or EVAL + metric not in other:
        return None
    one, two = _comparable_pairs(first), _comparable_pairs(second)
    if one and two and one.data == two.data and len(one.pairs.margins) == len(two.pairs.margins):
        values = [x.pairs.margins > 0 if metric == ACCURACY else x.pairs.margins for x in (one, two)]
        change = values[1].astype(float) - values[0]
        error = standard_error(change, one.pairs.prompt_pairs)
        return Difference(float(change.mean()), error, len(change))
    errors = [values.get(EVAL + metric + STDERR) for values in (own, other)]
    both = None if None in errors else math.hypot(*(error for error in errors if error is not None))
    return Difference(other[EVAL + metric] - own[EVAL + metric], both, None)


def _comparable_pairs(run: Run) -> StoredPairs | None:
    """The run's stored margins, if they are those of its last evaluation."""
    is_last = (
        run.pairs is not None and bool(run.evaluations) and run.pairs.step == run.evaluations[-1]["step"]
    )
    return run.pairs if is_last else None


def data_warnings(runs: Sequence[Run]) -> list[str]:
    """A sentence for every run whose data differs from the first run's, by the counts of what was read."""
    out = []
    for run in runs[1:]:
        differences = []
        for split in {**runs[0].data, **run.data}:
            facts = [_counts(one, split) for one in (runs[0], run)]
            if facts[0] != facts[1]:
                differences.append(f"{split}: {facts[0] or 'none'} against {facts[1] or 'none'}")
        if differences:
            out.append(f"{run.name} and {runs[0].name} have different data ({'; '.join(differences)}).")
        elif run.pairs and runs[0].pairs and run.pairs.data != runs[0].pairs.data:
            out.append(
                f"{run.name} and {runs[0].name} were evaluated on different held-out pairs, or tokenised "
                "them differently."
            )
    return out


def _counts(run: Run, split: str) -> str:
    facts = run.data.get(split)
    if not isinstance(facts, dict):
        return ""
    shown = [
        f"{facts[name]:,} {name}" for name in ("rows", "groups", "tokens") if isinstance(facts.get(name), int)
    ]
    return ", ".join(shown)
