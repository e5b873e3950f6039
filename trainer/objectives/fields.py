"""Parameters that several objectives share, with their ranges."""

from __future__ import annotations

from typing import Annotated

from pydantic import AliasChoices, Field

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
