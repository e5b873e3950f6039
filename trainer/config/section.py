"""The base of every section of the config, and what a key says of itself."""

from __future__ import annotations

from enum import Enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: unknown keys are errors, values are of their type, immutable and finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class Effect(Enum):
    """What another value of a key means for what was done with the old one."""

    NUMBERS = "numbers"
    """It trains other numbers: a run refuses to continue with it, a recipe does the stage again."""
    RESULT = "result"
    """It changes what a stage reads or writes beside the training, or names what counts by its content: a
    run may continue with it, a recipe does the stage again."""
    MEANS = "means"
    """It changes speed, memory, rounding or places: a run may continue with it, a recipe keeps the stage."""
    PACKED_ROWS = "packed rows"
    """MEANS; but NUMBERS where `model.router_aux_loss_coef` adds a loss that is formed of each packed row."""


def setting(
    default: Any = ...,
    *,
    effect: Effect = Effect.NUMBERS,
    names: Literal["path", "function"] | None = None,
    **options: Any,
) -> Any:
    """A pydantic field that says what a change of its value means, and whether it names something to read.

    A section's effect holds for all keys in it. `names`: a file, a folder or a model, or a function in a
    file, whose content decides a stage's result.
    """
    if default is not ...:
        options["default"] = default
    return Field(json_schema_extra={"effect": effect.value, "names": names}, **options)
