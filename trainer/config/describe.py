"""The keys of a config and the parameters of objectives, each with its values, default and description."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from madpo.trainer.config.defaults import EPOCHS, LEARNING_RATE
from madpo.trainer.config.effects import key_of, sections_in
from madpo.trainer.config.schema import Config
from madpo.trainer.config.section import Effect, Section
from madpo.trainer.field_words import values_of
from madpo.trainer.objectives.base import Item, Objective
from madpo.trainer.objectives.registry import OBJECTIVES

ON_A_RUN = {
    Effect.NUMBERS: ("fixed", ""),
    Effect.RESULT: ("can be changed", ""),
    Effect.MEANS: ("can be changed", ""),
    Effect.PACKED_ROWS: ("can be changed", " unless experts have a load-balancing loss"),
}
"""Effect -> whether a run that has begun can go on with another value, and on what condition."""

ON_A_RECIPE = {
    Effect.NUMBERS: "runs a finished stage again",
    Effect.RESULT: "runs a finished stage again",
    Effect.MEANS: "leaves a finished stage as it is",
    Effect.PACKED_ROWS: "leaves a finished stage as it is unless experts have a load-balancing loss",
}
"""Effect -> what another value does in a recipe."""

REQUIRED = "required"

BY_KIND = {
    "optim.lr": ", ".join(
        f"{rate} for {kind.value} ({of_adapter} for an adapter)"
        for kind, (rate, of_adapter) in LEARNING_RATE.items()
    ),
    "train.num_train_epochs": ", ".join(f"{epochs} for {kind.value}" for kind, epochs in EPOCHS.items()),
}
"""Key -> its defaults, where they depend on what is trained."""


class Entry(NamedTuple):
    """What is to know of a key."""

    key: str  # dotted; a parameter's name alone
    values: str
    default: str
    description: str
    effect: Effect

    @property
    def facts(self) -> str:
        """What it takes, its default, and whether a run that has begun can go on with another value."""
        default = REQUIRED if self.default == REQUIRED else f"default {self.default}"
        change, condition = ON_A_RUN[self.effect]
        return f"{self.values}; {default}; {change} once a run has begun{condition}"


class SectionEntry(NamedTuple):
    """A section, and the keys in it but not in a section inside it."""

    name: str  # dotted; "" for the whole config
    description: str
    entries: list[Entry]


def sections() -> list[SectionEntry]:
    """All sections, each before those inside it."""
    return list(_sections(Config, "", "keys that belong to no section"))


def parameters(loss_type: str) -> list[Entry]:
    """The parameters of an objective."""
    fields = OBJECTIVES[loss_type].params.model_fields
    return [
        _entry(field.serialization_alias or name, field, key_of("objective").effect)
        for name, field in fields.items()
        if name != "loss_type"
    ]


def kinds_of_objectives() -> dict[str, list[str]]:
    """What an objective learns from -> the names of those that do."""
    out: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name, objective in OBJECTIVES.items():
        out[kind_of(objective)].append(name)
    return out


KINDS = (
    PAIRS := "pairs, with a reference model",
    MARGINS := "pairs with margins, with a reference model",
    ALONE := "pairs, without a reference model",
    SINGLE := "single completions, labelled good or bad",
    SUPERVISED := "completions to imitate (madpo sft)",
    REWARD := "pairs, to train a reward model (madpo reward)",
)


def kind_of(objective: Objective) -> str:
    """The one of KINDS that an objective with its default parameters belongs to."""
    objective = objective.of(objective.params())
    if objective.is_reward_model:
        return REWARD
    if objective.supervised:
        return SUPERVISED
    if objective.item is Item.SEQUENCE:
        return SINGLE
    if objective.needs_margin:
        return MARGINS
    return PAIRS if objective.needs_reference else ALONE


def _sections(section: type[Section], prefix: str, description: str) -> Iterator[SectionEntry]:
    own, inner = list[Entry](), list[tuple[str, FieldInfo, type[Section]]]()
    for name, field in section.model_fields.items():
        key, inside = f"{prefix}{name}", list(sections_in(field))
        inner += [(key, field, one) for one in inside]
        if not inside:
            own.append(_entry(key, field, key_of(key).effect))
    yield SectionEntry(prefix.rstrip("."), description, own)
    for key, field, one in inner:
        yield from _sections(one, f"{key}.", field.description or "")


def _entry(key: str, field: FieldInfo, effect: Effect) -> Entry:
    values = "a section" if key == "objective" else values_of(field)
    return Entry(key, values, BY_KIND.get(key) or _default(field), field.description or "", effect)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return REQUIRED
    return in_yaml(field.get_default(call_default_factory=True))


def in_yaml(value: Any) -> str:
    """A value as a config has it, on one line."""
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", by_alias=True)
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
