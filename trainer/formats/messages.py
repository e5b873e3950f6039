"""Helpers of the adapters: questions, answers, transcripts and ShareGPT's turns as chat messages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from madpo.trainer.errors import UserError
from madpo.trainer.formats.chat_message import Messages, calls_in, read_message, under_function
from madpo.trainer.formats.text_groups import Text, TextGroup, objects, present, same_kind

Row = Mapping[str, Any]


def text_of(row: Row, *names: str) -> str:
    """The text in the one of these columns that holds any. Raises UserError, also if two hold others."""
    name = one_of(row, *names) or next((x for x in names if row.get(x) is not None), names[0])
    value = present(row, name)
    if not isinstance(value, str) or not value:
        raise UserError(f"{name}: expected text, got {value!r:.80}")
    return value


def one_of(row: Row, *names: str) -> str | None:
    """The name of the first of these columns that holds something. Raises UserError if another holds
    something else, since one of them would be left out."""
    held = [name for name in names if row.get(name)]
    if not held:
        return None
    first, *others = held
    for other in others:
        if row[other] != row[first]:
            raise UserError(
                f"{first} and {other}: both hold text, and one of them is read; set data.ignore_columns to "
                f"[{other}] or to [{first}]"
            )
    return first


def question(text: str, system: Any = None) -> Messages:
    """A question as messages, after a system message if there is text for one."""
    if system is not None and not isinstance(system, str):
        raise UserError(f"system: expected text, got {system!r:.80}")
    return [*([say("system", system)] if system else []), say("user", text)]


def say(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def answer(content: str) -> Text:
    return [say("assistant", content)]


def earlier_turns(row: Row) -> Messages:
    """The column `history`, pairs of a question and its answer, as messages. Raises UserError."""
    turns: list[Any] = row.get("history") or []
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(x, str) and x for x in turn):
            raise UserError(f"history: expected pairs of a question and its answer, got {turn!r:.80}")
    return [say(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]


def each(row: Row, name: str, read: Callable[[Row], Any]) -> list[Any]:
    """`read` applied to every object of the list in a column. Errors name the object's index."""
    results = []
    for index, value in enumerate(objects(row, name, at_least=2)):
        try:
            if not isinstance(value, dict):
                raise UserError(f"expected an object, got {value!r:.80}")
            results.append(read(value))
        except UserError as error:
            raise UserError(f"{name}[{index}]: {error}") from None
    return results


def pair(prompt: Any, chosen: Any, rejected: Any) -> TextGroup:
    return TextGroup(prompt, same_kind(prompt, chosen, rejected), [(0, 1, None)])


_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def transcript(row: Row, name: str) -> Messages:
    """The messages of "\\n\\nHuman: ...\\n\\nAssistant: ...", without the space after each colon."""
    before, *turns = _TURN.split("\n\n" + text_of(row, name).lstrip("\n"))
    if before or not turns:
        raise UserError(
            f'{name}: expected a transcript that begins with "\\n\\nHuman:", got {row[name]!r:.60}'
        )
    return [
        say(_ROLES[role], text.removeprefix(" ")) for role, text in zip(turns[::2], turns[1::2], strict=True)
    ]


_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}


def shared_turn(turn: Any, where: str) -> dict[str, Any]:
    """A ShareGPT turn, `from` and `value`, as a message with its other keys. Raises UserError that calls it
    `where`."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise UserError(f"{where}: expected an object with from and value, got {turn!r:.80}")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if turn.get("from") == "function_call":
        message = {"role": "assistant", "tool_calls": _called(turn["value"], where)}
    elif turn.get("from") in _SPEAKERS:
        message = say(_SPEAKERS[turn["from"]], turn["value"])
    else:
        speakers = ", ".join((*_SPEAKERS, "function_call"))
        raise UserError(f"{where}: from is one of {speakers}, got {turn.get('from')!r}")
    return read_message(where, {**others, **message})


def _called(text: str, where: str) -> list[dict[str, Any]]:
    """The calls in the text of a turn, each under the key `function`."""
    calls = calls_in(text, where)
    if not calls:
        raise UserError(f"{where}: expected tool calls, got {text!r:.80}")
    return list(map(under_function, calls))
