"""Translations: a conversation in the words that a chat template knows."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from madpo.trainer.formats.chat_message import ARGUMENTS, Messages, text_in, under_function
from madpo.trainer.formats.json_lines import object_in


class Conversation(NamedTuple):
    """What is said, and the tools that stand beside it."""

    messages: Messages
    tools: list[dict[str, Any]] = []  # noqa: RUF012  never changed


def _known_roles(messages: Messages) -> Messages:
    names = {"developer": "system", "function": "tool"}
    return [{**message, "role": names.get(message["role"], message["role"])} for message in messages]


def _text_of_parts(messages: Messages) -> Messages:
    return [
        {**message, "content": text_in(message)} if isinstance(message.get("content"), list) else message
        for message in messages
    ]


def _parts_of_text(messages: Messages) -> Messages:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _null_beside_calls(messages: Messages) -> Messages:
    return [
        {**message, "content": None} if message.get("tool_calls") and not message.get("content") else message
        for message in messages
    ]


def _empty_beside_calls(messages: Messages) -> Messages:
    return [
        {**message, "content": ""} if message.get("tool_calls") and not message.get("content") else message
        for message in messages
    ]


def _under_arguments(messages: Messages) -> Messages:
    def change(function: dict[str, Any]) -> dict[str, Any]:
        given = [key for key in ARGUMENTS if key in function]
        if len(given) != 1:
            return function
        return {"arguments" if key in given else key: x for key, x in function.items()}

    return _with_calls(messages, lambda call: with_function(call, change))


def _objects_for_arguments(messages: Messages) -> Messages:
    def change(function: dict[str, Any]) -> dict[str, Any]:
        arguments = object_in(function.get("arguments"))
        return function if arguments is None else {**function, "arguments": arguments}

    return _with_calls(messages, lambda call: with_function(call, change))


def _text_for_arguments(messages: Messages) -> Messages:
    def change(function: dict[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        if not isinstance(arguments, dict):
            return function
        return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}

    return _with_calls(messages, lambda call: with_function(call, change))


def _with_calls(messages: Messages, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Messages:
    """The messages with each of their tool calls changed."""
    return [
        {**message, "tool_calls": [change(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def with_function(call: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """A tool call with its function changed, which may stand under `function`."""
    return {**call, "function": change(call["function"])} if "function" in call else change(call)


def _object_for_parameters(tool: dict[str, Any]) -> dict[str, Any]:
    def change(function: Any) -> Any:
        text = function.get("parameters") if isinstance(function, dict) else None
        parameters = object_in(text) if isinstance(text, str) else None
        return function if parameters is None else {**function, "parameters": parameters}

    return with_function(tool, change)


def _in_messages(change: Callable[[Messages], Messages]) -> Callable[[Conversation], Conversation]:
    return lambda conversation: conversation._replace(messages=change(conversation.messages))


def _in_tools(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Conversation], Conversation]:
    return lambda conversation: conversation._replace(tools=[change(tool) for tool in conversation.tools])


TRANSLATIONS: dict[str, Callable[[Conversation], Conversation]] = {
    "role developer rendered as system, function as tool": _in_messages(_known_roles),
    "parts of text rendered as one text": _in_messages(_text_of_parts),
    "text rendered as a part": _in_messages(_parts_of_text),
    "no text beside tool calls rendered as null": _in_messages(_null_beside_calls),
    "no text beside tool calls rendered as empty text": _in_messages(_empty_beside_calls),
    "parameters, input or args of tool calls rendered as arguments": _in_messages(_under_arguments),
    "arguments of tool calls, a JSON text, rendered as an object": _in_messages(_objects_for_arguments),
    "arguments of tool calls, an object, rendered as its JSON text": _in_messages(_text_for_arguments),
    "bare tool calls rendered under the key function": _in_messages(
        lambda messages: _with_calls(messages, under_function)
    ),
    "parameters of tools, a JSON text, rendered as an object": _in_tools(_object_for_parameters),
    "bare tools rendered under the key function": _in_tools(under_function),
    "tools under the key function rendered bare": _in_tools(lambda tool: tool.get("function", tool)),
}
"""What is said of an example -> how its conversation is changed, if the template loses less that way."""


def translate(conversation: Conversation, translations: Sequence[str]) -> Conversation:
    """The conversation after these TRANSLATIONS, by name."""
    for name in translations:
        conversation = TRANSLATIONS[name](conversation)
    return conversation
