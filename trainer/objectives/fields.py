"""Parameters that several objectives share, with their ranges."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, AliasChoices, Field
from pydantic_core import PydanticCustomError

Beta = Annotated[
    float, Field(gt=0, description="strength with which the policy is held to the reference model")
]
LabelSmoothing = Annotated[
    float,
    Field(
        ge=0,
        lt=0.5,
        validation_alias=AliasChoices("label_smoothing", "eps"),
        serialization_alias="label_smoothing",
        description="assumed share of pairs whose labels are reversed",
    ),
]
Gamma = Annotated[float, Field(description="margin by which chosen should exceed rejected, after beta")]
Lambda = Annotated[
    float,
    Field(validation_alias=AliasChoices("lambda", "lam"), serialization_alias="lambda", ge=0),
]
NLLWeight = Annotated[
    float, Field(ge=0, description="weight of the chosen completion's negative log-likelihood")
]
Scale = Annotated[float, Field(gt=0, description="factor on chosen minus rejected log-prob")]
Average = Annotated[
    bool, Field(description="negative log-likelihood as a mean over tokens (true) or a sum (false)")
]

QUANTILE = re.compile(r"quantile:(0?\.\d*[1-9]\d*)")


def quantile_of(value: object) -> float | None:
    """The q of a value `quantile:q`; None for any other value."""
    match = QUANTILE.fullmatch(value) if isinstance(value, str) else None
    return float(match[1]) if match else None


def number(value: float | str) -> float:
    """The value as a number. Raises ValueError for a quantile that no data has resolved."""
    if isinstance(value, str):
        raise ValueError(f"{value} is taken of a run's training set; give a number here")
    return value


@dataclass(frozen=True)
class _NumberOrQuantile:
    """A validator: a number between two limits, or `quantile:q`."""

    above: float = -math.inf
    below: float = math.inf

    def __call__(self, value: float | str) -> float | str:
        if quantile_of(value) is None and (isinstance(value, str) or not self.above < value < self.below):
            raise PydanticCustomError("number_or_quantile", self.words)  # type: ignore[arg-type]
        return value

    @property
    def words(self) -> str:
        """The values that are allowed."""
        limits = (("above", self.above), ("below", self.below))
        parts = [f" {word} {limit:g}" for word, limit in limits if math.isfinite(limit)]
        return f"a number{' and'.join(parts)}, or quantile:q with q between 0 and 1, as in quantile:0.1"


Threshold = Annotated[float | str, AfterValidator(_NumberOrQuantile())]
"""A number, or `quantile:q` of the training set's values."""
PositiveThreshold = Annotated[float | str, AfterValidator(_NumberOrQuantile(above=0))]
ProbabilityThreshold = Annotated[float | str, AfterValidator(_NumberOrQuantile(above=0, below=1))]
