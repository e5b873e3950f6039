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
    if not 0 <= weight <= LARGEST_WEIGHT:
        raise UserError(f"{field}: expected a number from 0 to {LARGEST_WEIGHT:g}, got {value!r}")
    return weight


LARGEST_WEIGHT = 1e30
"""Losses are float32, whose largest number is 3.4e38."""


def label_of(row: Mapping[str, Any]) -> int:
    value = row.get("label")
    if value is None or value not in (True, False):  # 1 and 0 are equal to these
        raise UserError(f"label: true (or 1, desirable) or false (or 0), got {value!r}")
    return 1 if value else -1


LARGEST = 3.4028234663852886e38
"""The largest number of float32, in which losses are computed."""


def finite(value: Any, field: str) -> float:
    """The value as a float. Raises UserError for what is no finite number, or too large for float32."""
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    number = _float(value) if is_number else math.nan
    if not abs(number) <= LARGEST:
        is_large = is_number and value == value and abs(value) != math.inf
        raise UserError(
            f"{field}: expected a finite number, got {value!r:.80}"
            f"{', which is too large for float32' if is_large else ''}"
        )
    return number


def _float(number: int | float | Decimal) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf
