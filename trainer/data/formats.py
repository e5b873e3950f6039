"""Rows of a data set -> text groups: one prompt, its completions, and the edges that compare them.

Accepted columns, TRL's names:
    preference   prompt, chosen, rejected     text, or lists of messages; conversations may leave out
                 `prompt` or repeat it as text: their common leading messages are the prompt
                 margin, or score_chosen and score_rejected (also chosen_score and rejected_score)
    supervised   prompt, completion   or   messages   or   text
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, Any]]
Text = str | Messages


@dataclass(frozen=True)
class TextGroup:
    """A prompt with its completions. Edges are (winner, loser, margin or None)."""

    prompt: Text
    completions: list[Text]
    edges: list[tuple[int, int, float | None]]

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


LAYOUTS = (
    ("preference", {"chosen", "rejected"}),
    ("prompt-completion", {"prompt", "completion"}),
    ("messages", {"messages"}),
    ("text", {"text"}),
)


def layout_of(columns: Iterable[str]) -> str:
    """The layout that a data set's columns have. Raises ValueError that lists what was found."""
    columns = set(columns)
    for name, needed in LAYOUTS:
        if needed <= columns:
            return name
    known = "; ".join(" + ".join(sorted(needed)) for _, needed in LAYOUTS)
    raise ValueError(f"columns {sorted(columns)} are no known layout; give one of: {known}")


def to_group(row: dict[str, Any], layout: str) -> TextGroup:
    """One row as a group. Raises ValueError that names the field, what it holds and what it should."""
    if layout == "preference":
        return _preference(row)
    if layout == "prompt-completion":
        prompt = _text(row, "prompt")
        completion = _text(row, "completion")
        if isinstance(prompt, str) != isinstance(completion, str):
            raise ValueError("prompt and completion must both be text or both be lists of messages")
        return TextGroup(prompt, [completion], [])
    if layout == "messages":
        messages = _text(row, "messages")
        if isinstance(messages, str) or messages[-1]["role"] != "assistant":
            raise ValueError("messages: a list of messages that ends with the assistant's")
        return TextGroup(messages[:-1], [messages[-1:]], [])
    text = _text(row, "text")
    if not isinstance(text, str):
        raise ValueError("text: expected text; put conversations in a `messages` column")
    return TextGroup("", [text], [])


def _preference(row: dict[str, Any]) -> TextGroup:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    conversations = not isinstance(chosen, str) and not isinstance(rejected, str)
    if row.get("prompt") is not None and not (conversations and isinstance(row["prompt"], str)):
        prompt = _text(row, "prompt", may_be_empty=True)
        if not isinstance(prompt, str) and not isinstance(chosen, str):
            chosen, rejected = (_without_prefix(x, prompt) for x in (chosen, rejected))
    else:
        prompt, chosen, rejected = _split_conversations(chosen, rejected)
    if len({isinstance(x, str) for x in (prompt, chosen, rejected)}) > 1:
        raise ValueError("prompt, chosen and rejected must all be text or all be lists of messages")
    return TextGroup(prompt, [chosen, rejected], [(0, 1, _margin(row))])


def _without_prefix(completion: Text, prompt: Messages) -> Text:
    """UltraFeedback-style sets repeat the prompt's messages inside chosen and rejected."""
    if isinstance(completion, str) or completion[: len(prompt)] != prompt:
        return completion
    if len(completion) == len(prompt):
        raise ValueError("chosen or rejected holds nothing but the prompt")
    return completion[len(prompt) :]


def _split_conversations(chosen: Text, rejected: Text) -> tuple[Messages, Messages, Messages]:
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("prompt is missing; only conversations (lists of messages) may leave it out")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    if shared == 0:
        raise ValueError("prompt is missing, and chosen and rejected do not start with the same message")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _text(row: dict[str, Any], field: str, may_be_empty: bool = False) -> Text:
    value = row.get(field)
    if isinstance(value, str):
        if not value and not may_be_empty:
            raise ValueError(f"{field} is empty")
        return value
    if isinstance(value, list) and value:
        for message in value:
            ok = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not ok or not isinstance(message.get("content"), str):
                raise ValueError(f"{field}: a message needs text under role and content, got {message!r:.80}")
        return value
    raise ValueError(f"{field}: expected text or a list of messages, got {value!r:.80}")


SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))


def _margin(row: dict[str, Any]) -> float | None:
    """The margin column, else the difference of a pair of score columns, else None."""
    if row.get("margin") is not None:
        return _finite(row, "margin")
    for chosen, rejected in SCORES:
        if row.get(chosen) is not None and row.get(rejected) is not None:
            return _finite(row, chosen) - _finite(row, rejected)
    return None


def _finite(row: dict[str, Any], field: str) -> float:
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{field}: expected a finite number, got {value!r}")
    return float(value)


def parse_json_line(raw: bytes) -> dict[str, Any]:
    """One line of a JSON Lines file. Raises ValueError.

    Stricter than the usual readers, which turn numbers in a text column into text, accept NaN and
    keep the last of two equal keys.
    """
    try:
        row = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16, convert it with iconv" if raw[:2] in _UTF16 else ""
        raise ValueError(f"not UTF-8 ({error.reason}){hint}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno} of {raw[:60]!r}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number that can be trained on")
