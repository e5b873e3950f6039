"""The shape of a conversation: its messages and tools with a marker of its own in place of each text.

A marker that does not come out of a chat template stands for text that is lost.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import count, pairwise
from typing import Any, NamedTuple

from madpo.trainer.data.translations import Conversation, with_function
from madpo.trainer.formats.chat_message import ARGUMENTS, NAME, RESULTS, SPOKEN, Messages, says_something
from madpo.trainer.formats.json_lines import object_in

MARK = "madpo_text"
"""What stands in place of every text of a shape, until each gets a marker with a number."""

NO_ARGUMENT = f"{MARK}_"
"""The one key in the shape of arguments that are an empty object: it shows in which form they come out."""

NOTHING = "nothing"
"""The part that such a key stands for: a template that leaves it out loses nothing."""

ODD = "\u27e7"
THOUGHT = re.compile(r"(<think>|</think>)")


class Lost(NamedTuple):
    """A text that the template leaves out."""

    message: int  # index in the conversation; -1: tools, which stand beside it
    role: str  # of the message, or "tools"
    part: str  # a key of the message; `thinking` also for content before `</think>`; or a part of tools

    def __str__(self) -> str:
        if self.message < 0:
            return self.part if self.part == self.role else f"the {self.part} of tools"
        return f"{self.part} of message {self.message + 1} (role {self.role})"


def shape_of(conversation: Conversation) -> str:
    """The JSON text of a shape, for `marked`; equal for conversations that a template treats alike."""
    said = [{key: _shape_at(message, key) for key in message} for message in conversation.messages]
    return json.dumps([said, sorted(set(map(_shape_of_tool, conversation.tools)))])


def marked(shape: str) -> tuple[Conversation, dict[str, Lost]]:
    """The shape with a marker of its own in place of each text; what each marker stands for."""
    messages, tools = json.loads(shape)
    markers = (f"madpo{number:06d}text" for number in count())
    places: dict[str, Lost] = {}
    with_markers = [_numbered(message, index, markers, places) for index, message in enumerate(messages)]
    marked_tools = [_marked_tool(shape, markers, places) for shape in tools]
    return Conversation(with_markers, marked_tools), places


_MARKER = r"madpo\d{6}text"

MISSHAPEN = re.compile(
    r"""(?:\{'|\\"|\{\{"|'type': 'text', 'text': '|"type": "text", "text": ")(""" + _MARKER + ")"
)
"""A marker in an object or a list of parts that is printed as Python does, in JSON text that is escaped once
more, or in an object within the braces of another."""


def lost_in(text: str, places: dict[str, Lost]) -> tuple[Lost, ...]:
    """What does not come out of a template that writes this text, or comes out in another form."""
    misshapen = set(MISSHAPEN.findall(text))
    lost = [place for marker, place in places.items() if marker not in text or marker in misshapen]
    whole_tools = Lost(-1, TOOLS, TOOLS)
    return tuple(x for x in lost if x == whole_tools or x.message >= 0 or whole_tools not in lost)


def trims(text: str, messages: Messages) -> bool:
    """Whether the text leaves out blanks at the ends of these marked messages."""
    said = (texts_of(message.get("content")) for message in messages)
    ends = [end for texts in said for content in texts for end in _ENDS.findall(content)]
    return any(end not in text and json.dumps(end)[1:-1] not in text for end in ends)


def glued_in(text: str, messages: Messages) -> list[Lost]:
    """The marked messages whose parts stand together without the blanks between them, as a loss that another
    form of the message may not have."""
    lost: list[Lost] = []
    for index, message in enumerate(messages):
        for one, other in pairwise(texts_of(message.get("content"))):
            has_blanks = one != one.rstrip() or other != other.lstrip()
            ends = re.findall(rf"{_MARKER}\Z", one.rstrip()) + re.findall(rf"\A{_MARKER}", other.lstrip())
            if has_blanks and len(ends) == 2 and "".join(ends) in text:
                lost.append(Lost(index, message["role"], NOTHING))
    return lost


def common_prefix(one: str, other: str) -> int:
    """The number of characters that two texts begin with alike."""
    most = min(len(one), len(other))
    return bisect_left(range(1, most + 1), True, key=lambda n: one[:n] != other[:n])


def texts_of(content: Any) -> list[str]:
    """The texts of a message's content, one for each part."""
    if isinstance(content, list):
        return [part["text"] for part in content]
    return [content] if isinstance(content, str) else []


_ENDS = re.compile(rf"\A\s+{_MARKER}|{_MARKER}\s+\Z")


def _shape_at(message: dict[str, Any], key: str) -> Any:
    value = message[key]
    if key == "role":
        return value
    if key == "content" and isinstance(value, list):
        return [{"type": "text", "text": _shape_of_content(part["text"])} for part in value]
    if key == "content" and isinstance(value, str):
        return _shape_of_content(value)
    if key == "tool_calls":
        return [with_function(call, _shape_of_function) | _beside_function(call) for call in value]
    is_said = key in SPOKEN or (key == NAME and message["role"] not in RESULTS)
    if is_said and isinstance(value, str):
        return MARK if value.strip() else ""
    return _constant(value)


def _shape_of_content(content: str) -> str:
    pieces = [piece for piece in THOUGHT.split(content) if piece.strip()]
    text = "\n".join(piece if THOUGHT.fullmatch(piece) else MARK for piece in pieces)
    return _between_blanks(text, content) if pieces else ""


def _between_blanks(text: str, content: str) -> str:
    """The text between the blanks of a content, three of each kind: more than templates write themselves."""
    before, after = content[: -len(content.lstrip())], content[len(content.rstrip()) :]
    return "".join(sorted(set(before)) * 3) + text + "".join(sorted(set(after)) * 3)


def _shape_of_function(function: dict[str, Any]) -> dict[str, Any]:
    arguments = {key: _shape_of_arguments(x) for key, x in function.items() if key in ARGUMENTS}
    others = {key: x for key, x in function.items() if key not in ("name", *ARGUMENTS)}
    return {"name": MARK, **arguments, **_said_in(others)}


def _beside_function(call: dict[str, Any]) -> dict[str, Any]:
    """What a call holds beside its function: ids, and perhaps more that is said."""
    beside = {key: x for key, x in call.items() if key != "function"} if "function" in call else {}
    return {key: _constant(x) for key, x in beside.items()} | _said_in(beside)


def _said_in(fields: dict[str, Any]) -> dict[str, Any]:
    """What a call or its function says beside its name and arguments. Ids and types name things."""
    said = {key: x for key, x in fields.items() if says_something(x)}
    return {key: _leaves_marked(x) for key, x in said.items() if not _NAMES_A_THING.search(key)}


_NAMES_A_THING = re.compile(r"(^|_)(id|type)$|[a-z]Id$")


def _shape_of_arguments(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return {NO_ARGUMENT: 0} if arguments == {} else _leaves_marked(arguments)
    found = object_in(arguments)
    return MARK if found is None else json.dumps(_shape_of_arguments(found))


def _leaves_marked(value: Any) -> Any:
    """The value with a mark in place of each text and of each key, which a number tells apart."""
    if isinstance(value, dict):
        return {f"{MARK}{number}": _leaves_marked(x) for number, x in enumerate(value.values())}
    if isinstance(value, list):
        return [_leaves_marked(x) for x in value]
    if isinstance(value, str):
        return MARK if value.strip() else ""
    return value if isinstance(value, bool) or value is None else 0


def _constant(value: Any) -> Any:
    """A stand-in for what is no text: templates may look at the length of an id, and no further."""
    return "x" * len(value) if isinstance(value, str) else None


def _numbered(
    message: dict[str, Any], index: int, markers: Iterator[str], places: dict[str, Lost]
) -> dict[str, Any]:
    """The message with a marker of its own for each MARK, which is entered in `places`."""

    def filled(key: str, value: Any) -> Any:
        def enter(marker: str, behind: list[str]) -> None:
            part = "thinking" if key == "content" and any("</think>" in x for x in behind) else key
            is_sign = behind[0].startswith(NO_ARGUMENT.removeprefix(MARK))
            places[marker] = Lost(index, message["role"], NOTHING if is_sign else part)

        return _filled(value, markers, enter)

    return {key: value if key == "role" else filled(key, value) for key, value in message.items()}


def _filled(value: Any, markers: Iterator[str], enter: Callable[[str, list[str]], None]) -> Any:
    """The value with a marker for each MARK in its texts and keys. `enter` gets each marker and what stands
    behind it in its text, in the pieces between MARKs."""
    if isinstance(value, dict):
        return {_filled(name, markers, enter): _filled(x, markers, enter) for name, x in value.items()}
    if isinstance(value, list):
        return [_filled(x, markers, enter) for x in value]
    if not isinstance(value, str):
        return value
    text, *rest = value.split(MARK)
    for number, piece in enumerate(rest):
        marker = next(markers)
        enter(marker, rest[number:])
        text += marker + piece
    return text


def probes(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The message with other texts and arguments in place of its own; and with other content, for a message
    that says nothing else, as an empty result of a tool. Names of tools stay, which results repeat."""
    said = {key: _shape_at(message, key) for key in SPOKEN if key in message and key != "tool_calls"}
    if message.get("tool_calls"):
        said["tool_calls"] = [with_function(call, _with_other_arguments) for call in message["tool_calls"]]
    text = f"{MARK}{ODD}"  # ends otherwise than what stands before a message's content
    content: Any = [{"type": "text", "text": text}] if isinstance(message.get("content"), list) else text
    return [{**message, **said}, {**message, "content": content}]


def _with_other_arguments(function: dict[str, Any]) -> dict[str, Any]:
    other = {MARK: MARK}
    is_text = isinstance(function.get("arguments"), str)
    return {**function, "arguments": json.dumps(other) if is_text else other}


# Tools: JSON schemas of functions, bare or under `function`.

TOOLS = "tools"
DESCRIPTION, PARAMETERS = "description", "parameters"

_PARAMETERS = (PARAMETERS, "input_schema", "inputSchema")
"""Keys that hold the parameters of a tool: OpenAI's, Anthropic's and that of the Model Context Protocol."""

_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items", "additionalProperties")
"""Keys of a schema that hold schemas, one or a list."""

_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
"""Keys of a schema that hold schemas by name."""


def _shape_of_tool(tool: dict[str, Any]) -> str:
    """The JSON text of a tool with marks in place of its name, description and what its parameters say, or
    of all that it says if it has no name."""
    function = tool.get("function", tool)
    shape: dict[str, Any] = {"name": MARK}
    if isinstance(function, dict):
        if not says_something(function.get("name")):  # it is known by what else it says, as by its type
            rest = {key: x for key, x in function.items() if key not in (DESCRIPTION, *_PARAMETERS)}
            shape = {key: _leaves_marked(x) for key, x in rest.items() if says_something(x)}
        if says_something(function.get(DESCRIPTION)):
            shape[DESCRIPTION] = MARK
        shape[PARAMETERS] = _NO_PARAMETERS
        shape |= {key: _shape_of_parameters(function[key]) for key in _PARAMETERS if key in function}
    return json.dumps({"type": "function", "function": shape} if "function" in tool else shape)


def _shape_of_parameters(given: Any) -> Any:
    """The shape of a schema, of its JSON text, or of parameters by name without one."""
    if isinstance(given, str) and (found := object_in(given)) is not None:
        return json.dumps(_shape_of_parameters(found))
    if not isinstance(given, dict):
        return _leaves_marked(given) if says_something(given) else _NO_PARAMETERS
    if given and "properties" not in given and all(isinstance(x, dict) for x in given.values()):
        return _shape_of_named(given)
    return _NO_PARAMETERS | _shape_of_schema(given)


_NO_PARAMETERS = {"type": "object", "properties": {}}


def _shape_of_schema(schema: Any) -> Any:
    """The schema with a mark in place of each description, name and text to choose from; the rest of it may
    be left out, as templates write types in their own words."""
    if not isinstance(schema, dict):
        return schema if isinstance(schema, bool) else {}
    shape: dict[str, Any] = {"type": schema["type"]} if "type" in schema else {}
    if says_something(schema.get(DESCRIPTION)):
        shape[DESCRIPTION] = MARK
    if isinstance(schema.get("enum"), list) and any(map(says_something, schema["enum"])):
        shape["enum"] = [MARK]
    for key, value in schema.items():
        if key in _SCHEMAS:
            several = isinstance(value, list)
            shape[key] = _distinct(map(_shape_of_schema, value)) if several else _shape_of_schema(value)
        elif key in _NAMED_SCHEMAS and isinstance(value, dict):
            shape[key] = _shape_of_named(value)
    return shape


def _shape_of_named(schemas: dict[str, Any]) -> dict[str, Any]:
    """Schemas by name, each kind once, with marks that a number tells apart in place of names."""
    shapes = _distinct(map(_shape_of_schema, schemas.values()))
    return {f"{MARK}{number}": shape for number, shape in enumerate(shapes)}


def _distinct(shapes: Iterable[Any]) -> list[Any]:
    texts = sorted({json.dumps(shape, sort_keys=True) for shape in shapes})
    return [json.loads(text) for text in texts]


def _marked_tool(shape: str, markers: Iterator[str], places: dict[str, Lost]) -> dict[str, Any]:
    """A tool of this shape with a marker of its own for each MARK, which is entered in `places`."""

    def filled(key: str, value: Any) -> Any:
        place = Lost(-1, TOOLS, key if key in (DESCRIPTION, *_PARAMETERS) else TOOLS)
        return _filled(value, markers, lambda marker, behind: places.__setitem__(marker, place))

    tool: dict[str, Any] = json.loads(shape)
    return with_function(tool, lambda function: {key: filled(key, x) for key, x in function.items()})
