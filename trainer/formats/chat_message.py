"""One message of a conversation: what it says, how it is checked, and its weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from madpo.trainer.errors import UserError
from madpo.trainer.formats.numbers import is_mask, is_rating

Messages = list[dict[str, Any]]

THINKING = ("thinking", "reasoning_content", "reasoning")
"""Keys of an assistant's message that hold its thinking, beside its content."""

SPOKEN = ("content", *THINKING, "tool_calls")
"""The keys of a message that hold what it says."""

NAME = "name"
"""The key of a message that names who speaks; of one of RESULTS, the tool."""

RESULTS = ("tool", "function")
"""The roles of messages that hold what a tool has given."""

WEIGHT = "weight"
"""The key of a message that says whether its tokens are trained on, 1 or 0, once it is read."""

WEIGHTS = (WEIGHT, "train", "training", "loss", "loss_mask", "loss_scale", "loss_weight", "trainable")
"""How data sets call it: OpenAI `weight`, Axolotl `train` or `training`, ms-swift `loss`; and names that can
mean nothing else."""

KNOWN = frozenset({"role", *SPOKEN, *WEIGHTS, NAME, "tool_call_id", "id", "type", "tool_name", "prefix"})
"""Keys of messages that madpo looks at or that name things for the chat template."""


def read_message(field: str, message: Any) -> dict[str, Any]:
    """The message without null keys, its weight under one name. It needs a role, and text or parts of text
    unless it calls tools, whose arguments are kept as they are. Raises UserError that calls the place
    `field`."""
    if isinstance(message, dict) and isinstance(message.get("role"), str):
        message = _with_weight(field, _given(message))
        content, calls = message.get("content"), message.get("tool_calls")
        is_call = message["role"] == "assistant" and bool(calls) and isinstance(calls, list)
        if is_call and any(not isinstance(_function(call).get("name"), str) for call in calls or ()):
            raise UserError(f"{field}: a tool call has a function with a name, got {calls!r:.80}")
        if isinstance(content, list) and content:
            return {**message, "content": [_text_part(field, part) for part in content]}
        if isinstance(content, str) or (is_call and content is None):
            return message
    is_shared = isinstance(message, dict) and message.keys() >= {"from", "value"}
    hint = "; data.adapter=sharegpt reads from and value in a column conversations" if is_shared else ""
    raise UserError(
        f"{field}: a message needs text under role and content (or tool_calls of the assistant), "
        f"got {message!r:.80}{hint}"
    )


def _given(message: dict[str, Any]) -> dict[str, Any]:
    """The keys of a message, and of its calls and their functions, that do not hold null."""
    calls = message.get("tool_calls")
    if isinstance(calls, list):
        message = {**message, "tool_calls": [_given_call(call) for call in calls]}
    return not_null(message)


def _given_call(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    function = call.get("function")
    return not_null({**call, "function": not_null(function)} if isinstance(function, dict) else call)


def _with_weight(field: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message with what its WEIGHTS say under WEIGHT. Raises UserError for a value that is no weight, and
    for a key that is one of these but for its spelling, or a mask of unknown meaning."""
    for key, value in message.items():
        if key not in WEIGHTS and (key.strip().lower() in WEIGHTS or is_mask(key, value)):
            raise UserError(
                f"{field}: {key!r} of a message is not read; name it weight, 1 (trained on) or 0, or take it "
                "out"
            )
    given = {key: message[key] for key in WEIGHTS if key in message}
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise UserError(
                f"{field}: {key} of a message is 1 or true (trained on) or 0 or false, got {value!r:.80}"
            )
    if not given:
        return message
    if len(set(given.values())) > 1:
        raise UserError(f"{field}: {' and '.join(given)} of a message disagree, got {given}")
    others = {key: value for key, value in message.items() if key not in WEIGHTS}
    return {**others, WEIGHT: int(next(iter(given.values())))}


def without_weights(messages: Messages) -> Messages:
    """The messages without their weights, for a prompt, which is never trained on."""
    return [{key: value for key, value in message.items() if key != WEIGHT} for message in messages]


def unknown_keys(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys of messages that hold text or more, or a rating, and that only a template of its own would look
    at."""
    fields = (field for message in messages for field in message.items())
    return sorted(
        {
            key
            for key, value in fields
            if key not in KNOWN and (says_something(value) or is_rating(key, value))
        }
    )


def says_something(value: Any) -> bool:
    """Whether a value holds text, or anything but nothing in a list or an object."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list | dict) and bool(value)


def _function(call: Any) -> dict[str, Any]:
    """The name and the arguments of a tool call, which may stand under `function`."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    return function if isinstance(function, dict) else {}


def arguments_in(messages: Iterable[Mapping[str, Any]]) -> Iterator[Any]:
    """The arguments of every tool call."""
    for message in messages:
        yield from (_function(call).get("arguments") for call in message.get("tool_calls") or ())


def _text_part(field: str, part: Any) -> dict[str, Any]:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    kind = part.get("type") if isinstance(part, dict) else part
    raise UserError(f"{field}: content holds a part of type {kind!r:.40}; only parts of text are trained on")


def text_in(message: Mapping[str, Any]) -> str:
    """The text of a message, also where it stands in parts; empty if there is none."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def not_null(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that do not hold null. What is inside of them is left as it is."""
    return {key: value for key, value in fields.items() if value is not None}


def without_padding(value: Any) -> Any:
    """The value without the keys that hold null, at any depth: Arrow and Parquet give every object of a
    column every key. In lines of JSON a null is what somebody wrote."""
    if isinstance(value, dict):
        return {key: without_padding(x) for key, x in value.items() if x is not None}
    return [without_padding(x) for x in value] if isinstance(value, list) else value
