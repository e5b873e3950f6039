"""Columns of `datasets.ClassLabel`: files hold the number of a class, and its name says what it means."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import datasets

from madpo.trainer.formats.numbers import ClassName


def classes_in(features: Mapping[str, Any] | None) -> dict[str, Any]:
    """The columns among these features that hold class labels, at any depth."""
    return {name: feature for name, feature in (features or {}).items() if _holds_classes(feature)}


def with_class_names(value: Any, feature: Any) -> Any:
    """The value with the name in place of each class number. A name that is a number is that number, and a
    number below 0, which stands for no class, is None."""
    if value is None:
        return None
    if isinstance(feature, datasets.ClassLabel):
        return _name(feature.names[value]) if value >= 0 else None
    if isinstance(feature, Mapping):
        return {key: with_class_names(x, feature[key]) for key, x in value.items()}
    inner = getattr(feature, "feature", None)
    return value if inner is None else [with_class_names(x, inner) for x in value]


def _holds_classes(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(map(_holds_classes, feature.values()))
    inner = getattr(feature, "feature", None)
    return isinstance(feature, datasets.ClassLabel) or (inner is not None and _holds_classes(inner))


def _name(name: str) -> ClassName | int | float:
    try:
        number = json.loads(name)
    except ValueError:
        return ClassName(name)
    is_number = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    return number if is_number else ClassName(name)
