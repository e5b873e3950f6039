"""What a trainer to convert from is: its name, defaults and rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from madpo.launch.convert.draft import Draft, Rule, changed, lost, to
from madpo.trainer.config.foreign_keys import REPLACED, our_key
from madpo.trainer.config.schema import Config

TASKS = ("sft", "reward", "dpo", "kto", "orpo", "cpo", "simpo")
"""What a file may train; `dpo` is all losses of pairs with a reference."""


@dataclass(frozen=True)
class Peer:
    """A trainer whose configs are converted."""

    name: str
    rules: Mapping[str, Rule]
    """Its key -> what to do with it. Keys that say something only together are in `together`."""
    together: Callable[[Draft], None]
    defaults: Callable[[str], Mapping[str, Any]]
    """Task -> its own values of the keys that decide what is trained."""
    task_of: Callable[[Mapping[str, Any], str], str | None]
    """The task that the keys of a file, and the program that it calls, tell; None if they do not."""
    aliases: Mapping[str, str]
    """Other spelling of a key, or its name in other versions -> the name that the rules know."""


def each(keys: str, rule: Rule) -> dict[str, Rule]:
    """One rule for all keys that a text lists."""
    return dict.fromkeys(keys.split(), rule)


def plain(*keys: str) -> dict[str, Rule]:
    """Rules for keys whose value is the same here."""
    ours = {name: our_key(name, Config) for name in keys}
    return {name: to(key) for name, key in ours.items() if key is not None}


def otherwise(*keys: str) -> dict[str, Rule]:
    """Rules for keys that are done in another way here, as the error for an unknown key says."""
    return {name: changed(REPLACED[name]) for name in keys}


def missing(*keys: str) -> dict[str, Rule]:
    """Rules for keys that are not done here, as the error for an unknown key says."""
    return {name: lost(REPLACED[name]) for name in keys}


def as_list(value: Any) -> list[Any]:
    """A list: the value if it is one, its parts if it is text with commas, else the value alone."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def completions(draft: Draft) -> int:
    """The completions of a group, of which a micro-batch must hold one."""
    return 1 if draft.task == "sft" else 2
