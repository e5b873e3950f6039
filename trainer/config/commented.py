"""A resolved config as YAML in which every key is explained by a comment."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from madpo.trainer.config import strict_yaml
from madpo.trainer.config.schema import Config
from madpo.trainer.field_words import choices_of
from madpo.trainer.masking import masked
from madpo.trainer.objectives.base import Params
from madpo.trainer.objectives.registry import OBJECTIVES

WIDTH = 110
MOST_BEFORE_COMMENTS = 44
"""Characters of a key and its value that comments stand beside; over a longer one."""


def commented(config: Config, width: int = WIDTH) -> str:
    """The config as YAML with comments, wrapped to the width, and what `schema.dump` says."""
    lines = list(_lines(config, masked(config.model_dump(mode="json", by_alias=True)), ""))
    short = [len(line.text) for line in lines if len(line.text) <= MOST_BEFORE_COMMENTS]
    column = max(short) + 2
    return "".join(f"{text}\n" for line in lines for text in line.shown(column, width))


class _Line(NamedTuple):
    """A line of YAML and what is to be said of it."""

    text: str
    comment: str = ""
    is_part: bool = False  # the value goes on in the next line, and a comment beside it could fall into it

    def shown(self, column: int, width: int) -> Iterator[str]:
        """The line with its comment, which begins at the column, or stands above a line that reaches it."""
        beside = len(self.text) < column - 1 and not self.is_part
        indent = column if beside else len(self.text) - len(self.text.lstrip())
        comments = [f"# {part}" for part in wrap(self.comment, width - indent - 2, break_on_hyphens=False)]
        if beside:
            first, *more = comments or [""]
            yield f"{self.text:<{column}}{first}".rstrip()
            yield from (" " * column + comment for comment in more)
        else:
            yield from (" " * indent + comment for comment in comments)
            yield self.text


def _lines(section: BaseModel, tree: dict[str, Any], indent: str) -> Iterator[_Line]:
    for name, field in type(section).model_fields.items():
        key, value = field.serialization_alias or name, getattr(section, name)
        comment = _comment(section, name, field)
        if isinstance(value, BaseModel):
            yield _Line(f"{indent}{key}:", comment)
            yield from _lines(value, tree[key], f"{indent}  ")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            yield _Line(f"{indent}{key}:", comment)
            for item, branch in zip(value, tree[key], strict=True):
                first, *more = _lines(item, branch, f"{indent}  ")
                yield first._replace(text=f"{indent}- {first.text.lstrip()}")
                yield from more
        else:
            first, *more = strict_yaml.dump({key: tree[key]}).splitlines()
            yield _Line(indent + first, comment, is_part=bool(more))
            yield from (_Line(indent + line) for line in more)


def _comment(section: BaseModel, name: str, field: FieldInfo) -> str:
    """The description of a key, and the values it may have where that does not name them."""
    if isinstance(section, Params) and name == "loss_type":
        return OBJECTIVES[getattr(section, name)].equation
    text, choices = field.description or "", choices_of(field)
    return text if all(choice in text for choice in choices) else f"{text} ({', '.join(choices)})"
