"""Rows of a data set -> text groups: one prompt, its completions, and the edges that compare them.

Accepted columns, TRL's names:
    preference   prompt, chosen, rejected     text, or lists of messages; conversations may leave out
                 `prompt` or repeat it as text: their common leading messages are the prompt
                 margin, or score_chosen and score_rejected (also chosen_score and rejected_score)
    unpaired     prompt, completion, label     true (or 1) is desirable
    supervised   prompt, completion   or   messages   or   text
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from madpo.trainer.errors import UserError

Messages = list[dict[str, Any]]
Text = str | Messages


@dataclass(frozen=True)
class TextGroup:
    """A prompt with its completions. Edges are (winner, loser, margin or None)."""

    prompt: Text
    completions: list[Text]
    edges: list[tuple[int, int, float | None]]
    labels: list[int] = field(default_factory=list)  # 1 desirable, -1 undesirable; of all or none

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


LAYOUTS = (
    ("preference", {"chosen", "rejected"}),
    ("unpaired", {"prompt", "completion", "label"}),
    ("prompt-completion", {"prompt", "completion"}),
    ("messages", {"messages"}),
    ("text", {"text"}),
)


def layout_of(columns: Iterable[str], supervised: bool = False) -> str:
    """The layout that a data set's columns have; supervised training prefers the supervised ones.

    Raises ValueError that lists what was found.
    """
    columns = set(columns)
    for name, needed in (*LAYOUTS[2:], LAYOUTS[0]) if supervised else LAYOUTS:
        if needed <= columns:
            return name
    known = "; ".join(" + ".join(sorted(needed)) for _, needed in LAYOUTS)
    raise UserError(f"columns {sorted(columns)} are no known layout; give one of: {known}")


def to_group(row: dict[str, Any], layout: str, supervised: bool = False) -> TextGroup:
    """One row as a group. Supervised training keeps the chosen completion of a preference row.

    Raises ValueError that names the field, what it holds and what it should.
    """
    if layout == "preference":
        group = _preference(row)
        return TextGroup(group.prompt, group.completions[:1], []) if supervised else group
    if layout in ("prompt-completion", "unpaired"):
        prompt, completion = _text(row, "prompt"), _text(row, "completion")
        labels = [_label(row)] if layout == "unpaired" else [-1] * (row.get("label") is False)
        return TextGroup(prompt, _same_kind(prompt, completion), [], labels)
    if layout == "messages":
        messages = _text(row, "messages")
        if isinstance(messages, str) or len(messages) < 2:
            raise UserError("messages: a list of at least two messages, the last one the assistant's")
        return TextGroup(messages[:-1], _same_kind(messages[:-1], messages[-1:]), [])
    text = _text(row, "text")
    if not isinstance(text, str):
        raise UserError("text: expected text; put conversations in a `messages` column")
    return TextGroup("", [text], [])


def _preference(row: dict[str, Any]) -> TextGroup:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    prompt = _text(row, "prompt", may_be_empty=True) if row.get("prompt") is not None else None
    if (
        isinstance(chosen, list)
        and isinstance(rejected, list)
        and not (isinstance(prompt, list) and chosen[0]["role"] == "assistant")
    ):
        # Whole conversations; a prompt column beside them says again how they begin.
        prompt, chosen, rejected = _split_conversations(chosen, rejected)
    if prompt is None:
        raise UserError("prompt is missing; only conversations (lists of messages) may leave it out")
    return TextGroup(prompt, _same_kind(prompt, chosen, rejected), [(0, 1, _margin(row))])


def _split_conversations(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """The prompt is what both conversations begin with."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    if shared == 0:
        raise UserError("chosen and rejected do not start with the same message, and no prompt fits")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _same_kind(prompt: Text, *completions: Text) -> list[Text]:
    """The completions, if they and the prompt are all text or all messages of the assistant."""
    if len({isinstance(x, str) for x in (prompt, *completions)}) > 1:
        raise UserError("prompt and completions must all be text or all be lists of messages")
    for completion in completions:
        roles = [] if isinstance(completion, str) else [message["role"] for message in completion]
        if any(role in ("user", "system") for role in roles) or roles[-1:] not in ([], ["assistant"]):
            raise UserError(
                f"a completion has the roles {', '.join(roles)}; everything in it is trained on, so it "
                "must be the assistant's and end with the assistant; move the rest into the prompt"
            )
    return list(completions)


def _text(row: dict[str, Any], field: str, may_be_empty: bool = False) -> Text:
    value = row.get(field)
    if isinstance(value, str):
        if not value and not may_be_empty:
            raise UserError(f"{field} is empty")
        return value
    if isinstance(value, list) and value:
        for message in value:
            ok = isinstance(message, dict) and isinstance(message.get("role"), str)
            if not ok or not isinstance(message.get("content"), str):
                raise UserError(f"{field}: a message needs text under role and content, got {message!r:.80}")
        # Parquet gives every message every key, null where it has none.
        return [{k: v for k, v in message.items() if v is not None} for message in value]
    raise UserError(f"{field}: expected text or a list of messages, got {value!r:.80}")


SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
MARGIN_COLUMNS = frozenset({"margin", *SCORES[0], *SCORES[1]})


def _margin(row: dict[str, Any]) -> float | None:
    """The margin column, else the difference of a pair of score columns, else None."""
    if row.get("margin") is not None:
        return _finite(row, "margin")
    for chosen, rejected in SCORES:
        if row.get(chosen) is not None and row.get(rejected) is not None:
            return _finite({"margin": _finite(row, chosen) - _finite(row, rejected)}, "margin")
    return None


def _label(row: dict[str, Any]) -> int:
    value = row.get("label")
    if value is None or value not in (True, False):  # 1 and 0 are equal to these
        raise UserError(f"label: true (or 1, desirable) or false (or 0), got {value!r}")
    return 1 if value else -1


def _finite(row: dict[str, Any], field: str) -> float:
    value = row[field]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max:
        raise UserError(f"{field}: expected a finite number, got {value!r}")
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
        raise UserError(f"not UTF-8 ({error.reason}){hint}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg} at column {error.colno} of {raw[:60]!r}") from None
    except RecursionError:
        raise UserError("not JSON that can be read: nested too deeply") from None
    if not isinstance(row, dict):
        raise UserError(f"expected a JSON object, got {type(row).__name__}")
    return row


_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return row


def _no_constant(name: str) -> float:
    raise UserError(f"{name} is not a number that can be trained on")
