"""Numbers that examples bring: margins, weights, labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from madpo.trainer.errors import UserError

SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
MARGIN_COLUMNS = frozenset({"margin", *SCORES[0], *SCORES[1]})


def margin_of(row: Mapping[str, Any]) -> float | None:
    """The column `margin`, else the difference of two score columns, else None."""
    if row.get("margin") is not None:
        return finite(row["margin"], "margin")
    for chosen, rejected in SCORES:
        if row.get(chosen) is not None and row.get(rejected) is not None:
            return finite(finite(row[chosen], chosen) - finite(row[rejected], rejected), "margin")
    return None


def as_weight(value: Any, field: str) -> float:
    """The value as the weight of an example. Raises UserError for what is no number that losses can have as
    a factor."""
    weight = finite(value, field)
    if weight < 0:
        raise UserError(f"{field}: expected a number from 0 to {LARGEST:g}, got {value!r:.80}")
    return weight


class ClassName(str):
    """The name of a class, where a data set holds the number of one (`datasets.ClassLabel`)."""


DESIRABLE = {"desirable", "true", "yes", "good", "positive", "pos", "chosen", "accepted"}
UNDESIRABLE = {"undesirable", "false", "no", "bad", "negative", "neg", "rejected"}
"""Names of classes that say which completions are desirable."""

LABELS = ("label", "kto_tag")
"""Columns that say whether a single completion is desirable: TRL's name, and LLaMA-Factory's."""


def has_label(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) is not None for name in LABELS)


def label_of(row: Mapping[str, Any], is_needed: bool = True) -> int:
    """1 for a desirable completion, -1 for an undesirable one. Raises UserError for any other label, for none
    and for two that disagree."""
    held = {name: row[name] for name in LABELS if row.get(name) is not None} or {LABELS[0]: None}
    given = {name: _meaning(value) if isinstance(value, ClassName) else value for name, value in held.items()}
    for name, value in given.items():
        if value is None or value not in (True, False):  # 1 and 0 are equal to these
            is_class = isinstance(value, ClassName)
            hint = "; name the two classes desirable and undesirable" if is_class else ""
            advice = f"; set data.ignore_columns=[{name}] if it means something else"
            raise UserError(
                f"{name}: true (or 1, desirable) or false (or 0), got {'the class ' if is_class else ''}"
                f"{value!r:.80}{hint}{'' if is_needed else advice}"
            )
    if len(set(map(bool, given.values()))) > 1:
        raise UserError(f"{' and '.join(given)} disagree, got {given}")
    return 1 if next(iter(given.values())) else -1


def _meaning(name: ClassName) -> bool | ClassName:
    """Whether a class of this name is desirable; the name itself if it does not say so."""
    plain = name.strip().lower()
    return plain in DESIRABLE if plain in DESIRABLE | UNDESIRABLE else name


LARGEST = 1e12
"""The largest number that an example may bring, in size.

Losses, gradients and the squares of gradients are float32, which ends at 3.4e38. A gradient as long as 1e6,
times a weight of 1e12, has a square of 1e36.
"""


def finite(value: Any, field: str) -> float:
    """The value as a float. Raises UserError for what is no finite number, or larger than LARGEST."""
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    number = _float(value) if is_number else math.nan
    if not abs(number) <= LARGEST:
        is_large = is_number and value == value and abs(value) != math.inf
        raise UserError(
            f"{field}: expected a finite number, got {value!r:.80}"
            f"{f', which is too large: {LARGEST:g} is the most' if is_large else ''}"
        )
    return number


def _float(number: int | float | Decimal) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf
