"""What a change of a config key means for a continuation and for a recipe, read from the schema."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from madpo.trainer.config.schema import Config
from madpo.trainer.config.section import Effect, Section


class Key(NamedTuple):
    """What a key declares; see `section.setting`."""

    effect: Effect
    names: Literal["path", "function"] | None


@cache
def keys() -> dict[str, Key]:
    """Dotted key -> what it declares, for all keys of the config and its sections."""
    return dict(_keys(Config, "", None))


def may_continue(key: str, router_loss: bool) -> bool:
    """Whether a run may continue with another value of the key.

    `router_loss`: the run has a loss over each packed row.
    """
    effect = key_of(key).effect
    return effect in (Effect.RESULT, Effect.MEANS) or (effect is Effect.PACKED_ROWS and not router_loss)


def keeps_results(key: str, router_loss: bool) -> bool:
    """Whether a finished stage stays valid with another value of the key; arguments as `may_continue`."""
    effect = key_of(key).effect
    return effect is Effect.MEANS or (effect is Effect.PACKED_ROWS and not router_loss)


def key_of(dotted: str) -> Key:
    """What the key declares, or the key whose value contains it: `objective` for `objective.beta`."""
    while dotted not in keys():
        dotted, _, inner = dotted.rpartition(".")
        assert inner and dotted, f"{inner} is no key of the config"
    return keys()[dotted]


def _keys(section: type[Section], prefix: str, given: Effect | None) -> Iterator[tuple[str, Key]]:
    for name, field in section.model_fields.items():
        declared: Any = field.json_schema_extra or {}
        own = Effect(declared["effect"]) if "effect" in declared else Effect.NUMBERS
        effect = own if given in (None, Effect.NUMBERS) else given
        yield f"{prefix}{name}", Key(effect, declared.get("names"))
        for inner in sections_in(field):
            yield from _keys(inner, f"{prefix}{name}.", effect)


def sections_in(field: FieldInfo) -> Iterator[type[Section]]:
    """The sections that a key's type contains, directly or as items of a list."""

    def kinds(annotation: Any) -> Iterator[Any]:
        if get_origin(annotation) in (Union, UnionType, list):
            for part in get_args(annotation):
                yield from kinds(part)
        else:
            yield annotation

    for kind in kinds(field.annotation):
        if isinstance(kind, type) and issubclass(kind, Section):
            yield kind
