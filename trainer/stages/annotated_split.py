"""A data set's pairs with their scores by one or more reward models, and the files they are written to."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from madpo.trainer.data.source import Source, fields_of
from madpo.trainer.errors import UserError
from madpo.trainer.files import read_object, write_atomically, write_object
from madpo.trainer.formats.numbers import MARGIN_COLUMNS
from madpo.trainer.formats.read_row import bytes_as_text
from madpo.trainer.reports.calibration import calibration


@dataclass(frozen=True)
class JudgedSplit:
    """The R pairs of a split that all judges have scored."""

    rows: np.ndarray  # (R,) numbers of the examples, as in `GroupDataset.rows`
    scores: np.ndarray  # (judges, R, 2) of chosen and rejected
    folds: np.ndarray | None  # (R,) the judge that was not trained on the pair; None: no judge was
    not_finite: int = 0  # pairs left out, as a judge's score of them is infinite or no number

    @property
    def combined(self) -> np.ndarray:
        """Scores (R, 2) by the judge that was not trained on the pair; the mean of all if none was."""
        if self.folds is None:
            return self.scores.mean(0)
        return self.scores[self.folds, np.arange(len(self.rows))]

    @property
    def margins(self) -> np.ndarray:
        """Margins (judges, R) by each judge."""
        return self.scores[..., 0] - self.scores[..., 1]

    @property
    def margin_std(self) -> np.ndarray | None:
        """Standard deviations (R,) over the judges, where their mean is used; else None."""
        return self.margins.std(0) if self.folds is None and len(self.scores) > 1 else None

    @property
    def seen(self) -> np.ndarray | None:
        """Mean margins (R,) by the judges that were trained on the pair; None if none was."""
        if self.folds is None:
            return None
        was_trained = np.arange(len(self.scores))[:, None] != self.folds
        return (self.margins * was_trained).sum(0) / was_trained.sum(0)


def together(
    rows: list[np.ndarray],  # for each judge (G,)
    scores: list[np.ndarray],  # for each judge (G, 2)
    folds: np.ndarray | None,  # (G,) for the first judge's rows
) -> JudgedSplit:
    """Select the examples that all judges have scored: by its tokenizer, one may find an example too long.

    A score that is not finite is none. Raises UserError if no example is left.
    """
    common = reduce(np.intersect1d, rows)
    stacked = np.stack([own[np.searchsorted(at, common)] for own, at in zip(scores, rows, strict=True)])
    is_finite = np.isfinite(stacked).all((0, 2))
    if not is_finite.any():
        raise UserError(f"none of {len(common)} pairs has a finite score; look at the reward model's weights")
    kept = common[is_finite]
    own_folds = None if folds is None else folds[np.searchsorted(rows[0], kept)]
    return JudgedSplit(kept, stacked[:, is_finite], own_folds, int((~is_finite).sum()))


def write_split(
    target: Path, split: str, source: Source, scored: JudgedSplit, models: list[str], renames: dict[str, str]
) -> dict[str, Any]:
    """Write the annotated split, and facts about it into `annotation.json`; return the facts.

    The facts are the models, the source and the distribution of the margins. `renames` is `data.columns`:
    new columns get the source's own names, so that the config that read the source reads the result.
    """
    names = ["score_chosen", "score_rejected", "margin"]
    columns = [*scored.combined.T, margins_of(scored.combined)]
    if scored.margin_std is not None:
        names, columns = [*names, "margin_std"], [*columns, scored.margin_std]
    values = np.stack(columns, 1).tolist()
    new_columns = {
        row: {renames.get(name, name): x for name, x in zip(names, value, strict=True)}
        for row, value in zip(scored.rows.tolist(), values, strict=True)
    }
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{split}.jsonl"
    count = 0

    def write(partial: Path) -> None:
        nonlocal count
        with partial.open("w", encoding="utf-8") as file:
            for number, row in _rows(source):
                count += 1
                if number in new_columns:
                    line = _plain({**_without_margins(row, renames), **new_columns[number]})
                    file.write(json.dumps(line, ensure_ascii=False, allow_nan=False, default=str) + "\n")

    write_atomically(path, write)
    margins = margins_of(scored.combined)
    facts = {
        "models": models,
        "rule": _rule(scored),
        "source": source.name,
        "fingerprint": source.fingerprint,
        "rows": count,
        "scored": len(margins),
        "not_finite": scored.not_finite,
        "margin_quantiles": {str(q): float(np.quantile(margins, q)) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        **calibration(margins).numbers(),
    }
    if scored.margin_std is not None:
        facts["margin_std_mean"] = float(scored.margin_std.mean())
    if scored.folds is not None and scored.seen is not None:
        facts["rows_of_fold"] = np.bincount(scored.folds, minlength=len(models)).tolist()
        facts["in_sample"] = calibration(scored.seen).numbers()
    note = target / "annotation.json"
    write_object(note, {**read_object(note), split: facts})
    return facts


def _rule(scored: JudgedSplit) -> str:
    if scored.folds is not None:
        return f"hash of the prompt mod {len(scored.scores)} names the model, which was trained without it"
    return "mean of the models" if len(scored.scores) > 1 else "the model"


def margins_of(scores: np.ndarray) -> np.ndarray:
    """Margins (R,), chosen minus rejected, of scores (R, 2)."""
    return scores[:, 0] - scores[:, 1]


def _rows(source: Source) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, example) for every example, numbered as in the data set; unreadable lines are left out."""
    classes = source.classes
    for number, row in source.examples():
        with contextlib.suppress(UserError):
            yield number, bytes_as_text(fields_of(row, source.unit, classes))


def _without_margins(row: dict[str, Any], renames: dict[str, str]) -> dict[str, Any]:
    """Rename the example's margin and scores to names that nothing reads, in every further round too."""
    columns = {renames.get(name, name) for name in (*MARGIN_COLUMNS, "margin_std")}
    out = {key: value for key, value in row.items() if key not in columns}
    for key in columns & row.keys():
        given = f"{key}_given"
        while given in out:
            given += "_before"
        out[given] = row[key]
    return out


def _plain(value: Any) -> Any:
    """Replace NaN and infinity by null: Parquet has them, JSON does not."""
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_plain(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
