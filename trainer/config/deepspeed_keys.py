"""Which keys DeepSpeed reads in its config, asked of DeepSpeed itself, which ignores all others.

DeepSpeed looks every key up in the dict that it is given, whether it is there or not. So a dict that takes
notes of what is looked up knows the keys. Sections that DeepSpeed has a schema for are checked by that.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from madpo.trainer.config.accelerator import choose_accelerator
from madpo.trainer.config.error_text import explain
from madpo.trainer.errors import UserError, nearest, on_one_line

WHERE = "deepspeed"
NEEDED = {"train_micro_batch_size_per_gpu": 1}
"""What DeepSpeed's config is never without."""


class _Noted(dict[str, Any]):
    """A dict that knows which keys it was asked for, and so do the dicts in it. Copies share the notes."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({k: _Noted(v) if isinstance(v, dict) else v for k, v in content.items()})
        self.asked: set[str] = set()

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:  # half of DeepSpeed asks `key in block.keys()`
        return self

    def __iter__(self) -> Iterator[str]:  # so that unpacking asks for each key, and copies none unseen
        return super().__iter__()

    def unknown(self, where: str) -> Iterator[tuple[str, str, set[str]]]:
        """(place, key, known keys) of every key that nobody asked for, in a dict that was asked for some."""
        for key, value in self.items():
            if self.asked and key not in self.asked:
                yield where, key, self.asked
            elif isinstance(value, _Noted):
                yield from value.unknown(f"{where}.{key}")


def check_keys(block: dict[str, Any], owned: Collection[str] = ()) -> None:
    """Raise UserError for a key, at any depth, that DeepSpeed does not know, has removed or renamed.

    Also for a value that its schema refuses. `owned` keys are not suggested in place of an unknown one.
    """
    choose_accelerator()
    for key, value in block.items():
        noted = _asked_of(key, value)
        for where, name, known in noted.unknown(WHERE):
            allowed = known_keys() - set(owned) if where == WHERE else known
            raise UserError(f"{where}.{name}: unknown key{nearest(name, allowed)}")
    _refuse_renamed(block.get("zero_optimization", {}))


def _asked_of(key: str, value: Any) -> _Noted:
    """The block of this one key after DeepSpeed has read it. Raises UserError if DeepSpeed refuses it."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    noted = _Noted({**NEEDED, key: value})
    try:
        _read(noted)
    except ValidationError as error:
        first = next(iter(error.errors()[0]["loc"]), key)
        place = _place_of(str(first), {key: value}, WHERE) or f"{WHERE}.{key}"
        raise UserError(explain(error, _schema(error.title), f"{place}.")) from None
    except DeepSpeedConfigError as error:
        raise UserError(f"{WHERE}.{key}: {on_one_line(error)}") from None
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        if not isinstance(value, dict):
            reason = on_one_line(error)
            raise UserError(f"{WHERE}.{key}: DeepSpeed cannot read {value!r:.80}: {reason}") from None
    return noted  # of a section that this machine cannot serve, as far as it was read


def _place_of(name: str, block: dict[str, Any], where: str) -> str | None:
    """Where in a block, itself at `where`, a dict with this key is."""
    if name in block:
        return where
    inside = ((f"{where}.{key}", value) for key, value in block.items() if isinstance(value, dict))
    places = (_place_of(name, value, place) for place, value in inside)
    return next((place for place in places if place is not None), None)


def _read(block: dict[str, Any]) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    with _silent():
        DeepSpeedConfig(block)


@contextmanager
def _silent() -> Iterator[None]:
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@cache
def known_keys() -> frozenset[str]:
    """Every key that DeepSpeed looks for at the top, without those that it looks for to refuse them."""
    choose_accelerator()
    noted = _Noted(NEEDED)
    _read(noted)
    return frozenset(key for key in noted.asked if not _is_refused(key))


def _is_refused(key: str) -> bool:
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        _read({**NEEDED, key: {}})
    except DeepSpeedConfigError:
        return True
    except Exception:  # it wants something else than {}, and so reads it
        return False
    return False


def _schema(name: str) -> type[BaseModel]:
    """DeepSpeed's schema of that name, as errors call it."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    waiting: list[type] = [DeepSpeedConfigModel]
    while waiting:
        model = waiting.pop()
        if model.__name__ == name:
            return cast(type[BaseModel], model)
        waiting += model.__subclasses__()
    raise AssertionError(name)


def _refuse_renamed(zero: dict[str, Any]) -> None:
    """Raise UserError for a key under which DeepSpeed sets another one, unseen by our own checks of that."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key in zero.keys() & DeepSpeedZeroConfig.model_fields.keys():
        facts = DeepSpeedZeroConfig.model_fields[key].json_schema_extra
        if isinstance(facts, dict) and facts.get("deprecated"):
            instead = facts.get("new_param")
            hint = f"use {instead}" if instead else f"leave it out ({facts.get('deprecated_msg')})"
            raise UserError(f"{WHERE}.zero_optimization.{key}: DeepSpeed has given it up; {hint}")
