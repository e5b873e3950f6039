"""Strict reading of JSON: a line of a file, and the arguments of a tool call."""

from __future__ import annotations

import json
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
        row = json.loads(
            raw.decode("utf-8-sig").rstrip(), object_pairs_hook=unique_keys, parse_constant=_no_constant
        )
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


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values, for `json.loads`. Raises UserError for a key that stands twice."""
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
        value = json.loads(arguments, object_pairs_hook=unique_keys, parse_constant=_no_constant)
        json.dumps(value, allow_nan=False)  # which fails for a number that is too large
    except (ValueError, RecursionError):  # UserError is a ValueError
        return None
    return value if isinstance(value, dict) else None


def respelled(arguments: Any) -> bool:
    """Whether the JSON text of an object has a number that is written otherwise once it is read, as 1e5, or
    one of more digits than a float keeps."""
    spelled: list[str] = []
    if not isinstance(arguments, str) or not object_in(arguments):
        return False
    json.loads(arguments, parse_float=spelled.append, parse_int=spelled.append)
    return any(json.dumps(json.loads(number)) != number for number in spelled)
