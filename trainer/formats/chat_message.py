"""One message of a conversation: what it says, how it is checked, and its weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from madpo.trainer.errors import UserError
from madpo.trainer.formats.json_lines import read_json
from madpo.trainer.formats.numbers import is_mask, is_rating

Messages = list[dict[str, Any]]

THINKING = ("thinking", "reasoning_content", "reasoning")
"""Keys of an assistant's message that hold its thinking, beside its content."""

SPOKEN = ("content", *THINKING, "tool_calls")
"""The keys of a message that hold what it says."""

ARGUMENTS = ("arguments", "parameters", "input", "args")
"""Keys that hold the arguments of a tool call: OpenAI's, and those of Llama 3, Anthropic and LangChain."""

NAME = "name"
"""The key of a message that names who speaks; of one of RESULTS, the tool."""

RESULTS = ("tool", "function")
"""The roles of messages that hold what a tool has given."""

WEIGHT = "weight"
"""The key of a message that says whether its tokens are trained on, 1 or 0, once it is read."""

WEIGHTS = (WEIGHT, "train", "training", "loss", "loss_mask", "loss_scale", "loss_weight", "trainable")
"""How data sets call it: OpenAI `weight`, Axolotl `train` or `training`, ms-swift `loss`; and names that can
mean nothing else."""

PREFIX = "prefix"
"""The key of a message that says that the next one goes on with it, as in DeepSeek's and Mistral's APIs."""

KNOWN = frozenset({"role", *SPOKEN, *WEIGHTS, NAME, "tool_call_id", "id", "type", "tool_name", PREFIX})
"""Keys of messages that madpo looks at or that name things for the chat template."""


def read_message(field: str, message: Any) -> dict[str, Any]:
    """The message without null keys, with its calls as a list and its weight under one name. It needs a role,
    and text or parts of text unless it calls tools, whose arguments are kept as they are. Parts that are all
    blank become one text. Raises UserError that calls the place `field`."""
    if isinstance(message, dict) and isinstance(message.get("role"), str):
        message = _with_weight(field, _with_calls(field, not_null(message)))
        for key in THINKING:
            if message.get(key) and not isinstance(message[key], str):
                raise UserError(f"{field}: {key} of a message is text, got {message[key]!r:.80}")
        content = message.get("content")
        if isinstance(content, list) and content:
            message = {**message, "content": [_text_part(field, part) for part in content]}
            return message if text_in(message).strip() else {**message, "content": text_in(message)}
        if isinstance(content, str) or (content is None and message.get("tool_calls")):
            return message
    is_shared = isinstance(message, dict) and message.keys() >= {"from", "value"}
    hint = "; data.adapter=sharegpt reads from and value in a column conversations" if is_shared else ""
    raise UserError(
        f"{field}: a message needs text under role and content (or tool_calls of the assistant), "
        f"got {message!r:.80}{hint}"
    )


def _with_calls(field: str, message: dict[str, Any]) -> dict[str, Any]:
    """The message with its calls under `tool_calls`, where OpenAI's older `function_call` holds a single one.

    Raises UserError for what is no call, and for calls of another than the assistant.
    """
    given = {key: message[key] for key in ("tool_calls", "function_call") if message.get(key)}
    calls = [call for key, value in given.items() for call in calls_in(value, f"{field}: {key}")]
    if "function_call" in given:
        calls = list(map(under_function, calls))
    if not calls:
        return {key: value for key, value in message.items() if key not in given}
    names = " and ".join(given)
    if len(given) > 1:
        raise UserError(f"{field}: {names} of a message both hold calls, and one of them is read; keep one")
    if message["role"] != "assistant":
        raise UserError(
            f"{field}: {names}: only the assistant calls tools, got {given[names]!r:.80} of role "
            f"{message['role']}"
        )
    others = {key: value for key, value in message.items() if key not in given}
    return {**others, "tool_calls": calls}


def calls_in(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls without null keys: one call, a list of them, or the JSON text of either. Raises UserError
    that calls the place `where`."""
    found = value
    if isinstance(value, str):
        try:
            found = read_json(value) if value.strip() else []
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: expected tool calls, got no JSON, {value!r:.80}") from error
    calls = found if isinstance(found, list) else [found]
    if any(not isinstance(_function(call).get("name"), str) for call in calls):
        raise UserError(f"{where}: a tool call has a function with a name, got {value!r:.80}")
    return [_given_call(call) for call in calls]


def under_function(call: dict[str, Any]) -> dict[str, Any]:
    """The call, or the tool, in OpenAI's form, with its name under the key `function`."""
    return call if "function" in call else {"type": "function", "function": call}


def _given_call(call: dict[str, Any]) -> dict[str, Any]:
    """The keys of a call, and of its function, that do not hold null."""
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


def keys_beside_text(value: Any) -> set[str]:
    """Keys of parts of text, at any depth of a value, that hold text or more beside it."""
    if isinstance(value, dict):
        if value.get("type") == "text" and isinstance(value.get("text"), str):
            return {key for key, x in value.items() if key not in ("type", "text") and says_something(x)}
        value = list(value.values())
    return set[str]().union(*map(keys_beside_text, value)) if isinstance(value, list) else set()


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
        for function in map(_function, message.get("tool_calls") or ()):
            yield next((function[key] for key in ARGUMENTS if key in function), None)


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
