"""What a pydantic field takes, in words; and what is wrong with a value that it was given."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

NAMES: dict[Any, str] = {
    str: "text",
    Path: "text",
    int: "a whole number",
    float: "a number",
    dict: "a mapping",
    Any: "anything",
}


def values_of(field: FieldInfo) -> str:
    """The values that a field takes, as in `a number above 0 or null`."""
    examples = f", as in {' or '.join(map(str, field.examples))}" if field.examples else ""
    return _joined(_alternatives(field.annotation, field.metadata)) + examples


def choices_of(field: FieldInfo) -> list[str]:
    """The words that a field takes, or takes besides other values; [] if there are none."""

    def words(annotation: Any) -> list[str]:
        if get_origin(annotation) is Literal:
            return [str(value) for value in get_args(annotation)]
        return [word for part in get_args(annotation) for word in words(part)]

    return words(field.annotation)


def problem_of(item: Any, field: FieldInfo | None) -> str:
    """One of a ValidationError's `errors()`, without its key. `field` is None if the key is unknown."""
    message, kind, value = item["msg"].removeprefix("Value error, "), item["type"], item["input"]
    if kind == "missing":
        return "is required"
    if kind == "value_error":  # the words of a validator of ours
        return message if isinstance(value, dict | BaseModel) else f"{message} (got {_shown(value)})"
    expected = message if field is None else f"expected {values_of(field)}"
    return f"{expected}, got {_shown(value)}"


def _alternatives(annotation: Any, metadata: list[Any]) -> list[str]:
    """The kinds of values that a type has, each in words; `metadata` bounds them."""
    for part in metadata:
        if isinstance(part, AfterValidator) and (words := getattr(part.func, "words", None)):
            return [words]
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *own = get_args(annotation)
        return _alternatives(inner, [bound for part in own for bound in getattr(part, "metadata", [part])])
    if origin in (Union, UnionType):
        return [words for part in get_args(annotation) for words in _alternatives(part, metadata)]
    if origin is Literal:
        return [str(value) for value in get_args(annotation)]
    if annotation is bool:
        return ["true", "false"]
    if annotation is NoneType:
        return ["null"]
    if origin is list:
        some = "one or more " if any(isinstance(part, MinLen) for part in metadata) else ""
        return [f"a list of {some}{_plural(*get_args(annotation))}"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return ["a section"]
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return [str(member.value) for member in annotation]
    kind = origin or annotation
    words = NAMES.get(kind, kind.__name__)
    return [_bounded(words, metadata if kind in (int, float) else [])]


def _plural(kind: Any) -> str:
    words = _alternatives(kind, [])[0]
    return {"text": "texts", "a section": "sections", "a mapping": "mappings"}.get(words, "numbers")


def _bounded(words: str, metadata: list[Any]) -> str:
    """The name of a kind of number, with the narrower of several bounds on each side."""
    lower = [(part.gt, True) for part in metadata if isinstance(part, Gt)]
    lower += [(part.ge, False) for part in metadata if isinstance(part, Ge)]
    upper = [(part.lt, False) for part in metadata if isinstance(part, Lt)]
    upper += [(part.le, True) for part in metadata if isinstance(part, Le)]
    bounds = list[str]()
    if lower:
        value, is_above = max(lower)
        bounds.append(f"{'above' if is_above else 'of at least'} {value}")
    if upper:
        value, is_reached = min(upper)
        bounds.append(f"{'at most' if is_reached else 'below'} {value}")
    return f"{words} {' and '.join(bounds)}".strip()


def _joined(words: list[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _shown(value: Any) -> str:
    """A value as YAML has it."""
    text = repr(value)
    return {"None": "null", "True": "true", "False": "false"}.get(text, text)
