"""The messages for a config that does not fit the schema."""

from __future__ import annotations

from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from madpo.trainer.config.foreign_keys import counterpart, in_place_of, other_trainer
from madpo.trainer.errors import closest, nearest
from madpo.trainer.field_words import problem_of
from madpo.trainer.objectives.base import Params
from madpo.trainer.objectives.registry import OBJECTIVES

ON_POLICY = {
    "ppo",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "rloo",
    "reinforce",
    "reinforce++",
    "online_dpo",
    "xpo",
}
"""Algorithms that sample from the model while they train it."""


MOST_NAMED = 6
"""Objectives that a message names."""

TO_START_WITH = {
    "output_dir": "name a folder for the run, as in output_dir=runs/first",
    "model": "name the model to start from in model.model_name_or_path",
    "data": "name the data set in data.dataset_name",
}
"""Key without a default -> what to do."""


def explain(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> str:
    """The message for a validation error: each problem on a line, with key, fault and what is allowed.

    `prefix` stands before the keys.
    """
    # A union reports each of its kinds; what all of them allow is said with the first.
    lines = list(dict.fromkeys(prefix + _explain_one(item, schema) for item in error.errors()))
    if len(lines) == 1:
        return lines[0]
    advice = other_trainer(error.errors(), schema)
    return f"{len(lines)} problems{advice}\n" + "\n".join(f"  {line}" for line in lines)


def _explain_one(item: Any, schema: type[BaseModel]) -> str:
    place = _find(item["loc"], schema)
    kind = item["type"]
    prefix = f"{place.key}: " if place.key else ""
    if kind == "extra_forbidden":
        name = str(item["loc"][-1])
        instead = counterpart(place.key, schema) or _of_other_objectives(item["loc"], name, place.known)
        hint = f"; {instead}" if instead else nearest(name, place.known)
        return f"{prefix}unknown key{hint}"
    if kind == "missing" and place.key == "objective":
        return (
            "objective: is required; set objective.loss_type, as in objective.loss_type=dpo (madpo sft and "
            "madpo reward set it themselves; madpo config, show-data and check-data take --task sft or "
            "reward)"
        )
    if place.key in TO_START_WITH and (kind == "missing" or item["input"] is None):
        return f"{place.key}: is required; {TO_START_WITH[place.key]}"
    if kind == "union_tag_not_found":
        return f"{prefix}loss_type is required; one of {', '.join(OBJECTIVES)}"
    if kind == "union_tag_invalid":
        return f"objective.loss_type: {unknown_objective(str(item['ctx']['tag']))}"
    advice = in_place_of(place.key, item["input"])
    return prefix + problem_of(item, place.field) + (f"; {advice}" if advice else "")


def _of_other_objectives(location: tuple[Any, ...], name: str, known: list[str]) -> str | None:
    """What to say of a parameter that other objectives have; None for any other key, and for a slip."""
    if location[0] != "objective" or closest(name, known):
        return None
    owners = [loss for loss, each in OBJECTIVES.items() if {name} & each.params.keys()]
    if not owners:
        return None
    own = ", ".join(key for key in known if key != "loss_type") or "no parameters"
    more = f" and {len(owners) - MOST_NAMED} others (madpo keys {name})" if len(owners) > MOST_NAMED else ""
    return f"{location[1]} has {own}; {name} is a parameter of {', '.join(owners[:MOST_NAMED])}{more}"


def unknown_objective(name: str) -> str:
    """What to say of a name that is no objective's, or was none when the schema was made."""
    if name in OBJECTIVES:
        return (
            f"{name!r} was registered after the first config had been read; register objectives earlier (in "
            "a notebook: restart the kernel)"
        )
    if name.lower() in ON_POLICY:
        return (
            f"madpo has no on-policy RL, so no {name!r}; it trains on completions that are there: sample and "
            "judge them with madpo generate, then train with dpo or madpo, in rounds if you like"
        )
    return f"unknown objective {name!r}{nearest(name, OBJECTIVES)}"


class _Place(NamedTuple):
    """Where an error is."""

    key: str  # dotted
    field: FieldInfo | None  # None: an unknown key, or a section as a whole
    known: list[str]  # keys of the section that the key is in


def _find(location: tuple[Any, ...], schema: type[BaseModel]) -> _Place:
    """The place that pydantic's location means, without the names of a union's kinds at its end."""
    node, names, field = schema, list[str](), None
    if location[:1] == ("objective",) and location[1:2] and location[1] in OBJECTIVES:
        node, names, location = OBJECTIVES[location[1]].params, ["objective"], location[2:]
    for depth, part in enumerate(location, 1):
        names.append(str(part))
        if isinstance(part, int):
            continue
        if (name := _name_of(part, node)) is None:
            return _Place(".".join(names), None, _known_keys(node))
        field = node.model_fields[name]
        inner = _section_in(field.annotation)
        if inner is not None:
            node = inner
            continue
        if get_origin(field.annotation) is dict and location[depth:]:
            names += map(str, location[depth:])
            field = FieldInfo.from_annotation(get_args(field.annotation)[1])
        break
    return _Place(".".join(names), field, _known_keys(node))


def _name_of(key: str, section: type[BaseModel]) -> str | None:
    """The name of the field that a key gives."""
    if issubclass(section, Params):
        return next((x for x in section.model_fields if key in (x, *section.aliases(x))), None)
    return next((name for name, field in section.model_fields.items() if key in (name, field.alias)), None)


def _known_keys(section: type[BaseModel]) -> list[str]:
    return [field.serialization_alias or name for name, field in section.model_fields.items()]


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type, which may be a list of sections, or allow null; None for a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = (_section_in(part) for part in get_args(annotation))
    return next((section for section in sections if section is not None), None)
