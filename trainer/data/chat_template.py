"""Conversations through a chat template, with the certainty that what they say comes out.

A template leaves out what it does not know: a role, a key of a message, tools, the words before `</think>`.
Which ones is found without knowing the template: every shape of conversation is rendered once with a marker
in place of each text, and a marker that does not come out stands for text that is lost.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from itertools import chain, combinations
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from madpo.trainer.data.bounded_template import TemplateLimitError, bounded, within_bounds
from madpo.trainer.data.template_shape import (
    MARK,
    NOTHING,
    THOUGHT,
    TOOLS,
    Lost,
    common_prefix,
    glued_in,
    lost_in,
    marked,
    shape_of,
    texts_of,
    trims,
)
from madpo.trainer.data.translations import TRANSLATIONS, Conversation, translate
from madpo.trainer.errors import UserError, on_one_line
from madpo.trainer.formats.chat_message import NAME, THINKING, Messages, arguments_in, text_in
from madpo.trainer.formats.json_lines import object_in, respelled

NOW = "strftime_now"
"""The function of time that transformers gives templates: strftime of this moment, unless they are given
another. madpo gives that of `data.template_date`, so that tokens do not depend on the day."""

ANY_DAY = datetime(2026, 1, 1).strftime
"""What templates get where only their form is looked at."""


class Rendering(NamedTuple):
    """What a template makes of a shape of conversation."""

    translations: tuple[str, ...] = ()  # names in TRANSLATIONS, which it needs to bring out the most
    lost: tuple[Lost, ...] = ()  # even so
    is_trimmed: bool = False  # blanks at the ends of messages are left out
    is_dated: bool = False  # it asks for the time
    respelled: tuple[str, ...] = ()  # where numbers come out otherwise than the data wrote them


def render(
    messages: Messages,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],  # of `apply_chat_template`, among them `tools`
) -> tuple[list[int], Rendering]:
    """The tokens of a conversation, and what the template made of its shape.

    Raises UserError if there is no template, if it raises anything itself, or if it writes BOS twice.
    """
    given, tools = messages, options.get(TOOLS)
    messages, options, rendering = translated(messages, tokenizer, options)
    try:
        text = write(messages, tokenizer, options)
    except TemplateLimitError:
        raise
    except Exception as error:  # a template may raise anything
        raise UserError(f"the chat template refuses the conversation: {on_one_line(error)}") from error
    if altered := _altered(messages, text, rendering.lost):
        rendering = rendering._replace(lost=(*rendering.lost, *altered))
    if tools or any("tool_calls" in message for message in given):
        numbers = {  # before the translation, which may make a text of an object, and after it
            "arguments of tool calls": [*arguments_in(given), *arguments_in(messages)],
            "tools": [tools, options[TOOLS]],
        }
        of_numbers = tuple(place for place, said in numbers.items() if respelled(said))
        rendering = rendering._replace(respelled=of_numbers)
    ids: Any = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        raise UserError(
            f"the conversation begins with {tokenizer.bos_token} twice; the chat template writes it, so take "
            "it out of the data, or out of the template if the tokenizer adds it too"
        )
    return ids, rendering


def text_of(messages: Messages, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """The text of a conversation, whose tokens `render` gives; what the template raises is raised."""
    messages, options, _ = translated(messages, tokenizer, options)
    return write(messages, tokenizer, options)


def _altered(messages: Messages, text: str, known: Collection[Lost]) -> list[Lost]:
    """Contents of messages that do not stand in the text as they are, but for blanks at their ends.

    What a template does by length or by words, as a mark of its own around thinking, shows in real texts
    alone. Pieces beside `<think>` count apart, since templates put thinking in other places.
    """
    told = {lost.message for lost in known if lost.part in ("content", *THINKING)}
    cut = [
        Lost(index, message["role"], key)
        for index, message in enumerate(messages)
        for key in (*THINKING, "tool_calls")
        if message.get(key) and all((x.message, x.part) != (index, key) for x in known)
        if not (_calls_stand_in(text, message) if key == "tool_calls" else _stands_in(text, message[key]))
    ]
    return cut + [
        Lost(index, message["role"], "content")
        for index, message in enumerate(messages)
        if index not in told
        for content in [text_in(message)]
        if not _stands_in(text, content)
        and not all(_stands_in(text, piece) for piece in THOUGHT.split(content))
        and not all(_stands_in(text, part) for part in texts_of(message["content"]))
    ]


def _calls_stand_in(text: str, message: dict[str, Any]) -> bool:
    """Whether a text holds the arguments of a message's calls: as they are, or every text in them."""
    return all(
        any(_stands_in(text, x) for x in [given] if isinstance(x, str))
        or all(_stands_in(text, x) for x in _leaves(given))
        for given in arguments_in([message])
    )


def _leaves(arguments: Any) -> Iterator[str]:
    """Every text in arguments, or in those that their JSON text holds."""
    value = object_in(arguments) or arguments if isinstance(arguments, str) else arguments
    for x in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from [x] if isinstance(x, str) else _leaves(x)
    if isinstance(value, str):
        yield value


def _stands_in(text: str, content: str) -> bool:
    """Whether a text holds this content, as it is or escaped as in JSON, like tools' results in some."""
    words = content.strip()
    return words in text or any(json.dumps(words, ensure_ascii=x)[1:-1] in text for x in (False, True))


def translated(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> tuple[Messages, dict[str, Any], Rendering]:
    """A conversation and its options in the words that the template knows, and what it makes of its shape.

    Raises UserError if there is no template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the data set holds conversations and the tokenizer has no chat template; "
            "use an instruction-tuned tokenizer (model.tokenizer_name_or_path) or plain text columns"
        )
    variables = {name: value for name, value in options.items() if name not in (TOOLS, NOW)}
    conversation = Conversation(messages, options.get(TOOLS) or [])
    template: Any = tokenizer.chat_template  # text, or several by name
    written = template if isinstance(template, str) else repr(template)
    shape, given = shape_of(conversation), json.dumps(variables, sort_keys=True)
    rendering = _rendering(tokenizer, written, shape, given)
    messages, tools = translate(conversation, rendering.translations)
    return messages, {**options, TOOLS: tools or None}, rendering


def write(messages: Messages, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """What the template writes.

    `apply_chat_template` takes keys of null out of messages; some templates ask whether `content` is null.
    """
    options = dict(options)
    template = tokenizer.get_chat_template(None, options.get(TOOLS))
    now = options.pop(NOW, ANY_DAY)
    with within_bounds(template, repr(tokenizer.name_or_path)), _clock(template, now):
        if not any("content" in message and message["content"] is None for message in messages):
            text: Any = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            return text
        variables = {**tokenizer.special_tokens_map, **options}
        (text,), _ = render_jinja_template([messages], chat_template=template, **variables)
        return text


@contextmanager
def _clock(template: str, now: Callable[[str], str]) -> Iterator[None]:
    """Give a template this function of time. transformers passes no functions on to templates, but it keeps
    those that it has compiled, for others too."""
    known: Any = bounded(template).globals
    known[NOW] = now
    try:
        yield
    finally:
        del known[NOW]  # which uncovers that of transformers


def notes_on(
    rendering: Rendering, prompt_messages: int, may_drop: Sequence[str], scored: Collection[int] = ()
) -> list[str]:
    """What is to be said of an example of this shape, whose first messages are its prompt.

    Raises UserError if a message loses anything that is trained on (`scored`, by index), or another message
    something that `may_drop`, roles and parts, does not name, other than the thinking of earlier answers.
    """
    notes = list(rendering.translations)
    if rendering.is_dated:
        notes.append("the template writes the date, that of data.template_date")
    notes += [f"numbers in {place} written otherwise by the template" for place in rendering.respelled]
    if rendering.is_trimmed:
        notes.append("blanks at the ends of messages left out by the template")
    for lost in rendering.lost:
        name = lost.role if lost.message >= 0 else lost.part
        if lost.part == NAME:
            notes.append(f"name of a speaker left out by the template: role {lost.role}")
        elif lost.message in scored:
            raise UserError(
                f"the chat template leaves out {_in_completion(lost, prompt_messages)}, so it would not be "
                "trained on; take a template that renders it (model.tokenizer_name_or_path)"
            )
        elif lost.role in may_drop or lost.part in may_drop:
            part = str(lost) if lost.message < 0 else f"{lost.part} of role {lost.role}"
            where = "completion" if lost.message >= prompt_messages else "prompt"
            notes.append(f"left out of the {where} by the template: {part}")
        elif lost.part in THINKING and lost.role == "assistant":
            notes.append("thinking of earlier answers left out by the template")
        else:
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
    conversation, places = marked(shape)
    asked_for: list[str] = []

    def now(form: str) -> str:
        asked_for.append(form)
        return ANY_DAY(form)

    options = {**json.loads(variables), NOW: now}
    found: list[Rendering] = []
    for names, (messages, tools) in _translations_of(conversation):
        asked_for.clear()
        try:
            text = write(messages, tokenizer, {**options, TOOLS: tools or None})
        except TemplateLimitError:
            raise
        except Exception:  # a template may raise anything; it will again, for the example
            continue
        _refuse_addresses(text, tokenizer)
        if not options.get("add_generation_prompt") and not options.get("continue_final_message"):
            more = {**options, TOOLS: tools or None}
            _refuse_another_opening(text, messages, lambda x, more=more: write(x, tokenizer, more))
        lost = (*lost_in(text, places), *glued_in(text, messages))
        found.append(Rendering(names, lost, trims(text, messages), bool(asked_for)))
        if not found[-1].lost:
            return found[-1]
    # The first of those that lose the fewest: the one with the fewest translations.
    best = min(found, key=lambda x: len(x.lost), default=Rendering())
    return best._replace(lost=tuple(x for x in best.lost if x.part != NOTHING))


def _refuse_addresses(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError if this text of a shape holds an object's place in memory."""
    if found := _ADDRESS.search(text):
        raise UserError(
            f"the chat template of {tokenizer.name_or_path!r} writes {found[0]}, which is another text at "
            "every start; mend it, as with |list or () behind that value, or take another tokenizer"
        )


def _refuse_another_opening(text: str, messages: Messages, written: Callable[[Messages], str]) -> None:
    """Raise UserError if a template opens another answer behind this conversation, which ends with one: its
    end is that of the conversation before the answer, and is not there where a question follows."""
    if messages[-1]["role"] != "assistant":
        return
    try:
        before, followed = written(messages[:-1]), written([*messages, {"role": "user", "content": MARK}])
    except Exception:  # a template may raise anything, also for a part of a conversation
        return
    opening = text[common_prefix(text, followed) :]
    if opening.strip() and text.startswith(before) and before.endswith(opening):
        raise UserError(
            f"the chat template opens another answer behind the last one (it writes ...{opening!r:.60}), "
            "which would be trained on; let it do so only under add_generation_prompt"
        )


_ADDRESS = re.compile(r"<[^<>]{1,200} at 0x[0-9a-f]+>")
"""What Python writes for an object that has no text of its own, as a generator or a function."""


def _translations_of(conversation: Conversation) -> Iterator[tuple[tuple[str, ...], Conversation]]:
    """The names of translations and the conversation after them, for every subset all of which change it,
    smaller ones first."""
    subsets = chain.from_iterable(combinations(TRANSLATIONS, size) for size in range(len(TRANSLATIONS) + 1))
    for names in subsets:
        tried = conversation
        for name in names:
            before, tried = tried, TRANSLATIONS[name](tried)
            if before == tried:
                break
        else:
            yield names, tried
