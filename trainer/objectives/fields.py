"""Parameters that several objectives share, with their ranges."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, Field

Beta = Annotated[float, Field(gt=0, description="strength of the pull to the reference")]
LabelSmoothing = Annotated[
    float,
    Field(
        ge=0,
        lt=0.5,
        validation_alias=AliasChoices("label_smoothing", "eps"),
        serialization_alias="label_smoothing",
        description="share of labels taken to be reversed, below 1/2",
    ),
]
Gamma = Annotated[float, Field(description="margin that the scaled difference should exceed")]
Lambda = Annotated[
    float,
    Field(validation_alias=AliasChoices("lambda", "lam"), serialization_alias="lambda", ge=0),
]
NLLWeight = Annotated[float, Field(ge=0, description="weight of the chosen completion's NLL")]
Average = Annotated[bool, Field(description="per token (true) or summed over the completion (false)")]

QUANTILE = re.compile(r"quantile:(0?\.\d*[1-9]\d*)")


def quantile_of(value: object) -> float | None:
    """q of a parameter that is given as `quantile:q`, None for anything else."""
    found = QUANTILE.fullmatch(value) if isinstance(value, str) else None
    return float(found[1]) if found else None


def number(value: float | str) -> float:
    """The value, where a quantile has no meaning: ValueError."""
    if isinstance(value, str):
        raise ValueError(f"{value} is taken of a run's training set; give a number here")
    return value


def _number_or_quantile(value: float | str, above: float = -math.inf, below: float = math.inf) -> float | str:
    if quantile_of(value) is None and (isinstance(value, str) or not above < value < below):
        parts = [f" above {above:g}"] * math.isfinite(above) + [f" below {below:g}"] * math.isfinite(below)
        raise ValueError(f"a number{' and'.join(parts)}; or quantile:q, q in (0, 1), as in quantile:0.1")
    return value


Threshold = Annotated[float | str, AfterValidator(_number_or_quantile)]
"""A number, or which quantile it is of the training set's values."""
PositiveThreshold = Annotated[float | str, AfterValidator(partial(_number_or_quantile, above=0))]
ProbabilityThreshold = Annotated[float | str, AfterValidator(partial(_number_or_quantile, above=0, below=1))]
