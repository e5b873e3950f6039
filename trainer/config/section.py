"""The base of every section of the config, and how a key declares its effect."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from madpo.trainer.errors import UserError
from madpo.trainer.files import fault_of_path


class Section(BaseModel):
    """Base of every section: unknown keys and values of another type are errors; immutable, finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    def only(self, *names: str) -> dict[str, Any]:
        """The values of these keys, for the identity of what they decide; each must be a key."""
        unknown = set(names) - type(self).model_fields.keys()
        assert not unknown, f"{type(self).__name__} has no {', '.join(sorted(unknown))}"
        return self.model_dump(include=set(names))


def _reachable(folder: str) -> str:
    if fault := fault_of_path(folder):
        raise UserError(fault)
    return folder


FolderName = Annotated[str, AfterValidator(_reachable)]
"""A folder that is there, or can be made."""


class Effect(Enum):
    """What a new value of a key changes: whether a run may continue, whether a recipe runs a stage again."""

    NUMBERS = "numbers"
    """The numbers that are trained. A run refuses to continue; a recipe runs the stage again."""
    RESULT = "result"
    """What a stage reads or writes besides the trained numbers; or the key names a file whose content counts,
    not its name. A run may continue; a recipe runs the stage again."""
    MEANS = "means"
    """Speed, memory, rounding or places. A run may continue; a recipe keeps the finished stage."""
    PACKED_ROWS = "packed rows"
    """MEANS; but NUMBERS where `model.router_aux_loss_coef` adds a loss over each packed row."""


def setting(
    default: Any = ...,
    *,
    effect: Effect = Effect.NUMBERS,
    names: Literal["path", "function"] | None = None,
    **options: Any,
) -> Any:
    """A pydantic field that declares its effect, and whether its value names something to read.

    A section's effect holds for all keys in it. `names`: "path" for a file, a folder or a model, "function"
    for a function in a file; their content decides a stage's result.
    """
    if default is not ...:
        options["default"] = default
    return Field(json_schema_extra={"effect": effect.value, "names": names}, **options)
