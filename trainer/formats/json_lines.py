"""Strict reading of JSON: a line of a file, and the arguments of a tool call."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from madpo.trainer.errors import UserError

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json_line(raw: bytes) -> dict[str, Any]:
    """One line of a JSON Lines file. Raises UserError.

    It is stricter than the usual readers, which turn numbers in a text column into text, accept NaN, keep the
    last of two equal keys, and take half a character for one.
    """
    try:
        row = read_json(raw.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16, convert it with iconv" if raw[:2] in _UTF16 else ""
        raise UserError(f"not UTF-8 ({error.reason}){hint}") from None
    except json.JSONDecodeError as error:
        place = max(error.pos - 30, 0)
        near = error.doc[place : error.pos + 30]
        raise UserError(f"not JSON: {error.msg} at column {error.colno}, in {near!r}") from None
    except RecursionError:
        raise UserError("not JSON that can be read: nested too deeply") from None
    except UserError:
        raise
    except ValueError:  # Python reads no integer of more than some thousand digits
        raise UserError("not JSON that can be read: a number has thousands of digits") from None
    if not isinstance(row, dict):
        hint = "; write one object a line (jq -c '.[]' FILE does)" if isinstance(row, list) else ""
        raise UserError(f"expected a JSON object, got {type(row).__name__}{hint}")
    if _SURROGATE.search(raw):
        _check_characters(row)
    return row


def _check_characters(row: dict[str, Any]) -> None:
    """Raise UserError for half a character: one of the two \\u escapes that some characters take, alone."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        place = max(error.start - 30, 0)
        near = error.object[place : error.end]
        raise UserError(f"text holds half a character (a lone surrogate), in {near!r}") from None


def read_json(text: str) -> Any:
    """What a JSON text holds; a number that JSON writes otherwise than this text is one of Respelled.

    Raises what `json.loads` raises, and UserError for a key that stands twice and for what is no number that
    can be kept: NaN, Infinity, 1e400.
    """
    return json.loads(
        text,
        object_pairs_hook=_unique_keys,
        parse_constant=_no_constant,
        parse_float=_float,
        parse_int=_int,
    )


class Respelled:
    """A number that JSON writes otherwise than it was written, as 1.10 or 1e5."""


class _RespelledFloat(Respelled, float): ...


class _RespelledInt(Respelled, int): ...


def _float(spelled: str) -> float:
    number = float(spelled)
    if math.isinf(number):
        raise UserError(f"{spelled:.40} is too large a number to be read")
    return number if repr(number) == spelled else _RespelledFloat(number)


def _int(spelled: str) -> int:
    number = int(spelled)
    return number if str(number) == spelled else _RespelledInt(number)


def respelled(value: Any) -> bool:
    """Whether a value of `read_json` holds one of Respelled at any depth."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, Respelled) or any(map(respelled, inside))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return row


def _no_constant(name: str) -> float:
    raise UserError(f"{name} is not a number that can be trained on")


def object_in(arguments: Any) -> dict[str, Any] | None:
    """The object that the JSON text of a call's arguments holds, an empty one for none; None for all else."""
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str):
        return None
    try:
        value = read_json(arguments)
    except (ValueError, RecursionError):  # UserError is a ValueError
        return None
    return value if isinstance(value, dict) else None
