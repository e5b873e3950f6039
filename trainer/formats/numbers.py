"""Numbers that examples bring: margins, weights, labels."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from madpo.trainer.errors import UserError

SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
CROSSED = tuple((one[0], other[1]) for one in SCORES for other in SCORES if one != other)
MARGIN_COLUMNS = frozenset({"margin", *SCORES[0], *SCORES[1]})


MARGINS_DIFFER = "margin and scores, or scores under two names, disagree: the first of them is used"


def margin_of(row: Mapping[str, Any]) -> float | None:
    """The column `margin`, else the difference of two score columns, else None."""
    return next((_margin(row, columns) for columns in _margins_in(row)), None)


def margins_differ(row: Mapping[str, Any]) -> bool:
    """Whether an example has its margin twice, by a column and by scores or by two pairs of scores, and the
    two differ by more than by rounding."""
    first, *others = _margins_in(row) or [()]
    for columns in others:
        with suppress(UserError):  # for what is no number, since it is not used
            if not math.isclose(_margin(row, first), _margin(row, columns), rel_tol=0.01, abs_tol=1e-6):
                return True
    return False


def lone_scores(row: Mapping[str, Any]) -> set[str]:
    """The columns that hold one of two scores, and so make no margin."""
    given = {name for pair in SCORES for name in pair if row.get(name) is not None}
    return given.difference(*_margins_in(row))


def _margins_in(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The columns that make a margin of this example, those that are used first."""
    given = {name for name in MARGIN_COLUMNS if row.get(name) is not None}
    alone = [("margin",)] if "margin" in given else []
    if len(given) == len(alone):  # most have no scores, and each example asks several times
        return alone
    straight, crossed = ([pair for pair in pairs if given.issuperset(pair)] for pairs in (SCORES, CROSSED))
    return alone + (straight or crossed)


def _margin(row: Mapping[str, Any], columns: Sequence[str]) -> float:
    first, *second = (finite(row[name], name) for name in columns)
    return finite(first - second[0], "margin") if second else first


_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
RATINGS = {
    *("score", "rating", "reward", "margin", "weight", "importance", "gap", "strength", "preference"),
    *("delta", "difference", "diff", "quality", "confidence", "advantage", "logprob", "logp", "rank", "elo"),
}
MASKS = {"loss", "mask", "masked", "train", "trained", "trainable", "weight", "ignore", "ignored", "learn"}
"""Words in the names of numbers that say how good an example is or how much it counts, and of those that say
whether it counts."""


def is_rating(name: str, value: Any) -> bool:
    """Whether a column or a key holds a number that could be a margin or half of one, or a weight."""
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    return is_number and not RATINGS.isdisjoint(_words(name))


def is_mask(name: str, value: Any) -> bool:
    """Whether a key holds 0 or 1, or false or true, which could say whether something is trained on."""
    is_number = isinstance(value, int | float)
    return is_number and value in (0, 1) and not MASKS.isdisjoint(_words(name))


def _words(name: str) -> set[str]:
    """The words of a name, in snake case or camel case, as they are and without a plural's s."""
    words = {word.lower() for word in _WORD.findall(name)}
    return words | {word.removesuffix("s") for word in words}


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
