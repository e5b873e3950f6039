"""Conversations through a chat template, with the certainty that what they say comes out.

A template leaves out what it does not know: a role, a key of a message, tools, the words before `</think>`.
Which ones is found without knowing the template: every shape of conversation is rendered once with a marker
in place of each text, and a marker that does not come out stands for text that is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache
from itertools import chain, combinations, count
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from madpo.trainer.errors import UserError
from madpo.trainer.formats.chat_message import SPOKEN, THINKING, Messages, text_in


class Lost(NamedTuple):
    """A text that the template leaves out."""

    message: int  # index in the conversation; -1: tools, which stand beside it
    role: str
    part: str  # a key of the message; `thinking` also for content before `</think>`

    def __str__(self) -> str:
        if self.message < 0:
            return "tools"
        return f"{self.part} of message {self.message + 1} (role {self.role})"


class Rendering(NamedTuple):
    """What a template makes of a shape of conversation."""

    translations: tuple[str, ...]  # names in TRANSLATIONS, which it needs to bring out the most
    lost: tuple[Lost, ...]  # even so


# Translations: a conversation in the words that the template knows.


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


TRANSLATIONS: dict[str, Callable[[Messages], Messages]] = {
    "role developer rendered as system, function as tool": _known_roles,
    "parts of text rendered as one text": _text_of_parts,
    "text rendered as a part": _parts_of_text,
    "no text beside tool calls rendered as null": _null_beside_calls,
    "no text beside tool calls rendered as empty text": _empty_beside_calls,
}
"""What is said of an example -> how its conversation is changed, if the template loses less that way."""


def render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],  # of `apply_chat_template`, among them `tools`
) -> tuple[list[int], Rendering]:
    """The tokens of a conversation, and what the template made of its shape.

    Raises UserError if there is no template, or if it writes BOS twice, and whatever the template raises.
    """
    messages, rendering = translated(messages, tokenizer, options)
    text = write(messages, tokenizer, options)
    rendering = rendering._replace(lost=(*rendering.lost, *_altered(messages, text, rendering.lost)))
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise UserError(
            f"the conversation begins with {tokenizer.bos_token} twice; the chat template writes it, so take "
            "it out of the data, or out of the template if the tokenizer adds it too"
        )
    return ids, rendering


def _altered(messages: Messages, text: str, known: Collection[Lost]) -> list[Lost]:
    """Contents of messages that do not stand in the text as they are, but for blanks at their ends.

    What a template does by length or by words, as a mark of its own around thinking, shows in real texts
    alone. Pieces beside `<think>` count apart, since templates put thinking in other places.
    """
    told = {lost.message for lost in known}
    return [
        Lost(index, message["role"], "content")
        for index, message in enumerate(messages)
        if index not in told
        for content in [text_in(message)]
        if not _stands_in(text, content)
        and not all(_stands_in(text, piece) for piece in _THOUGHT.split(content))
    ]


def _stands_in(text: str, content: str) -> bool:
    """Whether a text holds this content, as it is or escaped as in JSON, like tools' results in some."""
    words = content.strip()
    return words in text or any(json.dumps(words, ensure_ascii=x)[1:-1] in text for x in (False, True))


def translated(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> tuple[Messages, Rendering]:
    """A conversation in the words that the template knows, and what the template makes of its shape.

    Raises UserError if there is no template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the data set holds conversations and the tokenizer has no chat template; "
            "use an instruction-tuned tokenizer (model.tokenizer_name_or_path) or plain text columns"
        )
    variables = {name: value for name, value in options.items() if name != "tools"}
    shape = json.dumps([_marked(messages), _forms(options.get("tools") or [])])
    template: Any = tokenizer.chat_template  # text, or several by name
    written = template if isinstance(template, str) else repr(template)
    rendering = _rendering(tokenizer, written, shape, json.dumps(variables, sort_keys=True))
    return translate(messages, rendering.translations), rendering


def translate(messages: Messages, translations: Sequence[str]) -> Messages:
    """The conversation after these TRANSLATIONS, by name."""
    for name in translations:
        messages = TRANSLATIONS[name](messages)
    return messages


def write(messages: Messages, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """What the template writes.

    `apply_chat_template` takes keys of null out of messages; some templates ask whether `content` is null.
    """
    if not any("content" in message and message["content"] is None for message in messages):
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text
    variables = {**tokenizer.special_tokens_map, **options}
    template = tokenizer.get_chat_template(None, options.get("tools"))
    (text,), _ = render_jinja_template([messages], chat_template=template, **variables)
    return text


def notes_on(
    rendering: Rendering, prompt_messages: int, may_drop: Sequence[str], scored: Collection[int] = ()
) -> list[str]:
    """What is to be said of an example of this shape, whose first messages are its prompt.

    Raises UserError if a message loses anything that is trained on (`scored`, by index), or another message
    something that `may_drop`, roles and parts, does not name, other than the thinking of earlier answers.
    """
    notes = list(rendering.translations)
    for lost in rendering.lost:
        if lost.message in scored:
            raise UserError(
                f"the chat template leaves out {_in_completion(lost, prompt_messages)}, so it would not be "
                "trained on; take a template that renders it (model.tokenizer_name_or_path)"
            )
        if lost.role in may_drop or lost.part in may_drop:
            part = lost.part if lost.message < 0 else f"{lost.part} of role {lost.role}"
            where = "completion" if lost.message >= prompt_messages else "prompt"
            notes.append(f"left out of the {where} by the template: {part}")
        elif lost.part in THINKING and lost.role == "assistant":
            notes.append("thinking of earlier answers left out by the template")
        else:
            name = lost.part if lost.message < 0 else lost.role
            raise UserError(
                f"the chat template leaves out {lost}; take a template that renders it, or set "
                f"data.template_may_drop=[{name}] if that is meant"
            )
    return list(dict.fromkeys(notes))


def _in_completion(lost: Lost, prompt_messages: int) -> str:
    return f"{lost.part} of the completion's message {lost.message - prompt_messages + 1} (role {lost.role})"


@lru_cache(maxsize=10_000)
def _rendering(tokenizer: PreTrainedTokenizerBase, written: str, shape: str, variables: str) -> Rendering:
    """Render a shape with markers, in every combination of the translations that change it.

    `written` is the tokenizer's template, which may be exchanged.
    """
    marked, forms = json.loads(shape)
    numbers = count()
    places: dict[str, Lost] = {}
    messages = [_numbered(message, index, numbers, places) for index, message in enumerate(marked)]
    options = json.loads(variables)
    if forms:
        tools = {_marker(next(numbers)): form for form in forms}
        options["tools"] = [_tool(marker, form) for marker, form in tools.items()]
        places |= dict.fromkeys(tools, Lost(-1, "", "tools"))
    found: list[Rendering] = []
    for names in _subsets(TRANSLATIONS):
        tried = messages
        for name in names:
            before, tried = tried, TRANSLATIONS[name](tried)
            if before == tried:
                break
        else:
            try:
                text = write(tried, tokenizer, options)
            except Exception:  # a template may raise anything; it will again, for the example
                continue
            if _shows_python(text):
                continue
            lost = tuple(place for marker, place in places.items() if marker not in text)
            rendering = Rendering(names, lost)
            if not lost:
                return rendering
            found.append(rendering)
    # The first of those that lose the fewest: the one with the fewest translations.
    return min(found, key=lambda x: len(x.lost), default=Rendering((), ()))


def _subsets(names: Collection[str]) -> Iterator[tuple[str, ...]]:
    """All subsets, smaller ones first."""
    return chain.from_iterable(combinations(names, size) for size in range(len(names) + 1))


def _shows_python(text: str) -> bool:
    """Whether a list of parts was printed as such, by a template that expects text."""
    return "{'type': 'text'" in text or '{"type": "text"' in text


# The shape of a conversation: its messages with MARK in place of each text.

MARK = "madpo_text"
ODD = "\u27e7"
_THOUGHT = re.compile(r"(<think>|</think>)")


def _marked(messages: Messages) -> Messages:
    return [{key: _shape_of(key, value) for key, value in message.items()} for message in messages]


def _shape_of(key: str, value: Any) -> Any:
    if key == "role":
        return value
    if key == "content" and isinstance(value, str):
        pieces = [piece for piece in _THOUGHT.split(value) if piece.strip()]
        return "\n".join(piece if _THOUGHT.fullmatch(piece) else MARK for piece in pieces)
    if key == "content" and isinstance(value, list):
        return [{"type": "text", "text": MARK if part["text"].strip() else ""} for part in value]
    if key == "tool_calls":
        return [_shape_of_call(call) for call in value]
    if key in SPOKEN and isinstance(value, str):
        return MARK if value.strip() else ""
    return _constant(value)


def _shape_of_call(call: dict[str, Any]) -> dict[str, Any]:
    function, outside = (call["function"], call) if "function" in call else (call, {})
    arguments = _arguments_marked(function.get("arguments"))
    shape = {"name": MARK, "arguments": arguments}
    ids = {key: _constant(value) for key, value in outside.items() if key != "function"}
    return {**ids, "function": shape} if outside else shape


def _arguments_marked(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return _leaves_marked(arguments)
    try:
        return json.dumps(_leaves_marked(json.loads(arguments)))
    except ValueError:
        return MARK


def probes(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The message with other texts and arguments in place of its own; and with other content, for a message
    that says nothing else, as an empty result of a tool. Names of tools stay, which results repeat."""
    said = {key: _shape_of(key, message[key]) for key in SPOKEN if key in message and key != "tool_calls"}
    if message.get("tool_calls"):
        said["tool_calls"] = [_with_other_arguments(call) for call in message["tool_calls"]]
    text = f"{MARK}{ODD}"  # ends otherwise than what stands before a message's content
    content: Any = [{"type": "text", "text": text}] if isinstance(message.get("content"), list) else text
    return [{**message, **said}, {**message, "content": content}]


def _with_other_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_other_arguments(call["function"])}
    arguments, other = call.get("arguments"), {MARK: MARK}
    return {**call, "arguments": json.dumps(other) if isinstance(arguments, str) else other}


def _constant(value: Any) -> Any:
    """A stand-in for what is no text: templates may look at the length of an id, and no further."""
    return "x" * len(value) if isinstance(value, str) else None


def _leaves_marked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _leaves_marked(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_leaves_marked(x) for x in value]
    if isinstance(value, str):
        return MARK if value.strip() else ""
    return value if isinstance(value, bool) or value is None else 0


def _numbered(
    message: dict[str, Any], index: int, numbers: Iterator[int], places: dict[str, Lost]
) -> dict[str, Any]:
    """The message with a marker of its own for each MARK, which is entered in `places`."""

    def fill(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: fill(x, key) for name, x in value.items()}
        if isinstance(value, list):
            return [fill(x, key) for x in value]
        if not isinstance(value, str):
            return value
        first, *rest = value.split(MARK)
        for number, piece in enumerate(rest):
            marker = _marker(next(numbers))
            is_thought = key == "content" and any("</think>" in later for later in rest[number:])
            places[marker] = Lost(index, message["role"], "thinking" if is_thought else key)
            first += marker + piece
        return first

    return {key: value if key == "role" else fill(value, key) for key, value in message.items()}


def _marker(number: int) -> str:
    return f"madpo{number:06d}text"


def _forms(tools: list[dict[str, Any]]) -> list[str]:
    """How the tools are written, each form once: under `function`, or bare."""
    return sorted({"function" if "function" in tool else "bare" for tool in tools})


def _tool(marker: str, form: str) -> dict[str, Any]:
    tool = {"name": marker, "description": marker, "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": tool} if form == "function" else tool
