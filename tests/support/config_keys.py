"""Every key of the config as a dotted name, from the schema itself, and a config in which it is another."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from madpo.trainer.config.data import DatasetPart
from madpo.trainer.config.generate import EndpointConfig, GenerateConfig, JudgeConfig
from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.config.schema import Config

OBJECTIVE = "objective"
"""One key here: a union of sections that has keys of its own for each loss_type."""


def kinds(annotation: Any) -> list[Any]:
    """The types that a value may be of, without None."""
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in kinds(part)]
    return [] if annotation is type(None) else [annotation]


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a key holds, alone, or as one of a list."""
    for kind in kinds(field.annotation):
        inner = get_args(kind)[0] if get_origin(kind) is list else kind
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            return inner
    return None


def dotted(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Dotted key -> its field. A section that may be null is a key, too, beside those that it holds."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        key, inner = prefix + name, None if prefix + name == OBJECTIVE else section_of(field)
        if inner is None or field.annotation is not inner:
            found[key] = field
        if inner is not None:
            found |= dotted(inner, f"{key}.")
    return found


def filled(config: Config) -> Config:
    """The config with every section that may be null: not one that can be run, but one that has all keys."""
    judge = JudgeConfig(endpoint=EndpointConfig(url="http://localhost", model="m"))
    return config.model_copy(
        update={
            "peft": PeftConfig(lora_r=4),
            "generate": GenerateConfig(judge=judge),
            "data": config.data.model_copy(update={"datasets": [DatasetPart(path="a.jsonl")]}),
        }
    )


def other(config: Any, key: str) -> Any:
    """The config, or a section, with another value at a dotted key; the value need not be a sensible one."""
    name, _, rest = key.partition(".")
    old = getattr(config, name)
    if rest and isinstance(old, list):
        new: Any = [other(old[0], rest), *old[1:]]
    else:
        new = other(old, rest) if rest else _other_value(old, type(config).model_fields[name])
    return config.model_copy(update={name: new})


def _other_value(old: Any, field: FieldInfo) -> Any:
    if section_of(field) is not None:
        return None
    for kind in kinds(field.annotation):
        choices = get_args(kind) if get_origin(kind) is Literal else _samples(kind)
        for choice in choices:
            if choice != old:
                return choice
    raise AssertionError(f"no other value than {old!r} for {field}")


def _samples(kind: Any) -> list[Any]:
    if get_origin(kind) is list:
        return [[_samples(kinds(get_args(kind)[0])[0])[0]]]
    known: dict[Any, list[Any]] = {
        bool: [True, False],
        int: [3, 5],
        float: [0.25, 0.5],
        str: ["other"],
        dict: [{"other": "other"}],
    }
    return known[get_origin(kind) or kind]
