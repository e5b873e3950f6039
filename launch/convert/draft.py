"""A config of ours in the making: which of another trainer's keys became what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

FILL_IN = "FILL_IN"
"""The value of a key that the file does not say, and that has no default."""


class Fate(StrEnum):
    """What became of a key."""

    TAKEN = "taken"
    """It means the same here, under a key of ours or without one."""
    CHANGED = "changed"
    """It is done in another way here."""
    LOST = "lost"
    """It is not done here."""
    UNKNOWN = "unknown"
    """It is no key of that trainer that we know."""


class Verdict(NamedTuple):
    fate: Fate
    why: str = ""


@dataclass
class Draft:
    """The keys of a file, the config that they become, and what is to be said about it."""

    peer: str
    task: str
    given: Mapping[str, Any]  # the file's keys; one that is null is as good as absent
    defaults: Mapping[str, Any]  # the trainer's own values, of the keys that decide what is trained
    gpus: int | None
    folder: Path  # of the file, for files that it names
    spelling: Mapping[str, str]  # a key -> how the file spells it, where that is another way
    config: dict[str, Any] = field(default_factory=dict)  # our dotted key -> value
    origins: dict[str, str] = field(default_factory=dict)  # our dotted key -> where its value comes from
    verdicts: dict[str, Verdict] = field(default_factory=dict)  # a key of the file -> what became of it
    seen: set[str] = field(default_factory=set)  # keys that are done with, of the file or not
    by_hand: list[str] = field(default_factory=list)  # what is left to do
    remarks: list[str] = field(default_factory=list)  # differences that no single key stands for

    def value(self, name: str) -> Any:
        """The value that the file gives the key, else the trainer's default, else None."""
        given = self.given.get(name)
        return self.defaults.get(name) if given is None else given

    def take(self, key: str, value: Any, *names: str, why: str = "") -> None:
        """Set our key to what the file's keys `names` say. `why`: in what the meaning differs."""
        given = [self.spelling.get(name, name) for name in names if self.given.get(name) is not None]
        origin = ", ".join(given) or f"default of {self.peer}"
        self.config[key] = value
        self.origins[key] = f"{origin}: {why}" if why else origin
        self.settle(Fate.CHANGED if why else Fate.TAKEN, *names, why=why)
        if why and not given:
            self.remarks.append(f"{names[0]}, by default: {why}")

    def settle(self, fate: Fate, *names: str, why: str = "") -> None:
        """Note what became of the file's keys `names`."""
        self.seen.update(names)
        for name in names:
            if self.given.get(name) is not None:
                self.verdicts[name] = Verdict(fate, why)

    def count(self, *fates: Fate) -> int:
        """The number of the file's keys that met one of these fates."""
        return sum(verdict.fate in fates for verdict in self.verdicts.values())


Rule = Callable[[Draft, str], None]
"""What to do with one key of the file: (draft, its name)."""


def to(key: str, convert: Callable[[Any], Any] = lambda value: value, why: str = "") -> Rule:
    """A rule: the key is `key` here. `convert` translates its value."""
    return lambda draft, name: draft.take(key, convert(draft.value(name)), name, why=why)


def not_needed(draft: Draft, name: str) -> None:
    """A rule: what it asks for is so here, or there is nothing to set."""
    draft.settle(Fate.TAKEN, name)


def with_others(draft: Draft, name: str) -> None:
    """A rule for a key that says something only together with others, which did not ask for it."""
    draft.settle(Fate.LOST, name, why="has no effect beside the other keys of this file")


def only(*values: Any, why: str, fate: Fate = Fate.LOST) -> Rule:
    """A rule: these values ask for what is so here; any other has the fate, for this reason."""

    def rule(draft: Draft, name: str) -> None:
        if draft.value(name) in values:
            draft.settle(Fate.TAKEN, name)
        else:
            draft.settle(fate, name, why=why)

    return rule


def changed(why: str) -> Rule:
    """A rule: it is done in another way here."""
    return only(why=why, fate=Fate.CHANGED)


def lost(why: str) -> Rule:
    """A rule: it is not done here."""
    return only(why=why)
