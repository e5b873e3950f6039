"""An example of a data set -> a text group: one prompt, its completions, and the edges that compare them.

Accepted columns, under TRL's names:
    preference   prompt, chosen, rejected     text, or lists of messages; conversations may leave out
                 `prompt` or repeat it as text: their common leading messages are the prompt
                 margin, or score_chosen and score_rejected (also chosen_score and rejected_score)
                 weight, in every layout: a factor on the losses of the example
    unpaired     prompt, completion, label     true (or 1) is desirable
    supervised   prompt, completion   or   messages   or   text
                 label, as for unpaired; what is undesirable is not imitated
    scored       prompt, completions, scores   a list of texts or of lists of messages, and its numbers
Conversations may have columns `tools` and `chat_template_kwargs` too, for the chat template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import xxhash

from madpo.trainer.errors import UserError
from madpo.trainer.formats.chat_message import (
    RESULTS,
    THINKING,
    WEIGHT,
    Messages,
    arguments_in,
    read_message,
    text_in,
    unknown_keys,
)
from madpo.trainer.formats.json_lines import object_in
from madpo.trainer.formats.numbers import as_weight, finite, label_of, margin_of

Text = str | Messages


@dataclass(frozen=True)
class TextGroup:
    """A prompt with its completions. Edges are (chosen, rejected, margin or None)."""

    prompt: Text
    completions: list[Text]
    edges: list[tuple[int, int, float | None]]
    labels: list[int] = field(default_factory=list)  # 1 desirable, -1 undesirable; all completions or none
    tools: list[dict[str, Any]] = field(default_factory=list)  # JSON schemas, for the chat template
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # more variables of the chat template
    weight: float | None = None  # factor on the losses of all edges or completions; None: the row has none
    completion_weights: list[float] = field(default_factory=list)  # further factors; all completions or none
    whole: bool = field(default=False, compare=False)  # cut out of conversations, between two messages
    unused: tuple[str, ...] = field(default=(), compare=False)  # columns with text that nothing looks at
    unknown_keys: tuple[str, ...] = field(default=(), compare=False)  # of messages, with text
    odd: tuple[str, ...] = field(default=(), compare=False)  # what is odd in columns, for the user
    compared: bool = field(default=False, compare=False)  # from `ranked`, maybe with fewer than two scores

    @property
    def conversational(self) -> bool:
        return not isinstance(self.prompt, str)


LAYOUTS = (
    ("preference", {"chosen", "rejected"}),
    ("unpaired", {"prompt", "completion", "label"}),
    ("prompt-completion", {"prompt", "completion"}),
    ("messages", {"messages"}),
    ("text", {"text"}),
    ("scored", {"prompt", "completions", "scores"}),
)


BESIDE = {"preference": frozenset({"prompt"})}
"""Layout -> columns that it looks at besides those it needs."""


SUPERVISED_ORDER = ("prompt-completion", "messages", "text", "scored", "preference")
"""Supervised training takes a layout with single completions first, else the best completion of several."""


def layout_of(columns: Iterable[str], supervised: bool = False) -> str:
    """The layout of a data set with these columns.

    Raises UserError that lists the columns and all layouts.
    """
    columns, needed = set(columns), dict(LAYOUTS)
    for name in SUPERVISED_ORDER if supervised else needed:
        if needed[name] <= columns:
            return name
    layouts = "; ".join(" + ".join(sorted(names)) for names in needed.values())
    raise UserError(f"columns {sorted(columns)} are no known layout; give one of: {layouts}")


def to_group(row: Mapping[str, Any], layout: str, supervised: bool = False) -> TextGroup:
    """The group of an example with this layout. Supervised training keeps the best completion only.

    Raises UserError that names the field, its value and what it should hold.
    """
    if layout in ("preference", "scored"):
        group = preference(row) if layout == "preference" else _scored(row)
        return best_only(group) if supervised else group
    if layout in ("prompt-completion", "unpaired"):
        prompt = text_or_messages(row, "prompt", may_be_empty=True)
        completion = text_or_messages(row, "completion")
        labels = [label_of(row)] if layout == "unpaired" else []
        return TextGroup(prompt, same_kind(prompt, completion), [], labels)
    if layout == "messages":
        messages = text_or_messages(row, "messages")
        if isinstance(messages, str) or len(messages) < 2:
            raise UserError("messages: a list of at least two messages, the last one the assistant's")
        first = _first_trained_on(messages)
        return TextGroup(messages[:first], same_kind(messages[:first], messages[first:]), [], whole=True)
    text = text_or_messages(row, "text")
    if not isinstance(text, str):
        raise UserError("text: expected text; put conversations in a `messages` column")
    return TextGroup("", [text], [])


def _first_trained_on(messages: Messages) -> int:
    """The first message of the completion: the last one, or the first answer of a weight that is not 0 if
    there are weights."""
    last = len(messages) - 1
    if not any(WEIGHT in message for message in messages):
        return last
    answers = [i for i, message in enumerate(messages) if i and message["role"] == "assistant"]
    return next((i for i in answers if messages[i].get(WEIGHT) != 0), last)


def best_only(group: TextGroup) -> TextGroup:
    """The group with one completion, the first that no other beats; for supervised training."""
    if len(group.completions) == 1:
        return group
    if not group.completions:
        raise UserError("no completion has a score, and so none is the best")
    rejected = {loser for _, loser, _ in group.edges}
    best = next(index for index in range(len(group.completions)) if index not in rejected)
    weights = group.completion_weights[best : best + 1]
    return replace(
        group, completions=[group.completions[best]], edges=[], labels=[], completion_weights=weights
    )


def ranked(
    prompt: Text,
    completions: Sequence[Text],
    scores: Sequence[float],  # one for each completion
    with_margins: bool = True,
) -> TextGroup:
    """A group with an edge for every two completions of different scores; ties prefer nothing. The margin
    is the difference of the scores."""
    edges: list[tuple[int, int, float | None]] = [
        (winner, loser, finite(better - worse, "margin") if with_margins else None)
        for winner, better in enumerate(scores)
        for loser, worse in enumerate(scores)
        if better > worse
    ]
    return TextGroup(prompt, same_kind(prompt, *completions, may_be_empty=True), edges, compared=True)


def _scored(row: Mapping[str, Any]) -> TextGroup:
    """The group of the layout `scored`. A completion may be empty, as a model may end at once; one without
    a score is dropped."""
    completions, scores = (objects(row, name, at_least=2) for name in ("completions", "scores"))
    if len(completions) != len(scores):
        raise UserError(f"scores: {len(scores)} numbers for {len(completions)} completions")
    texts = [as_text(x, f"completions[{i}]", may_be_empty=True) for i, x in enumerate(completions)]
    scored = [i for i, score in enumerate(scores) if score is not None]
    numbers = [finite(scores[i], f"scores[{i}]") for i in scored]
    prompt = text_or_messages(row, "prompt", may_be_empty=True)
    group = ranked(prompt, [texts[i] for i in scored], numbers)
    weights = row.get("weight")
    if not isinstance(weights, list):
        return group
    if len(weights) != len(completions):
        raise UserError(f"weight: {len(weights)} numbers for {len(completions)} completions")
    return replace(group, completion_weights=[as_weight(weights[i], f"weight[{i}]") for i in scored])


def objects(row: Mapping[str, Any], name: str, at_least: int = 1) -> list[Any]:
    """The list in a column. Raises UserError for anything else, or a shorter one."""
    value = row.get(name)
    if not isinstance(value, list) or len(value) < at_least:
        raise UserError(f"{name}: expected a list of at least {at_least}, got {value!r:.80}")
    return value


def preference(row: Mapping[str, Any]) -> TextGroup:
    """The group of the layout `preference`: chosen and rejected, perhaps a prompt. Raises UserError."""
    chosen, rejected = text_or_messages(row, "chosen"), text_or_messages(row, "rejected")
    prompt = text_or_messages(row, "prompt", may_be_empty=True) if row.get("prompt") is not None else None
    unused: Sequence[str] = ()
    is_whole = False
    if (
        isinstance(chosen, list)
        and isinstance(rejected, list)
        and not (isinstance(prompt, list) and _goes_on(prompt, chosen, rejected))
    ):
        # Two whole conversations: a prompt column only repeats how they begin.
        given, is_whole = prompt, True
        prompt, chosen, rejected = _split_conversations(chosen, rejected)
        if given and not holds(prompt, given):
            raise UserError(
                f"prompt: says more than the two conversations begin with, got {given!r:.80}; write it into "
                "chosen and rejected too, or leave these without their beginning"
            )
        unused = _keys_beside(prompt, given) if isinstance(given, list) else ()
    if prompt is None:
        raise UserError(
            "prompt is missing; only conversations (lists of messages) may leave it out; transcripts in one "
            "text are read by data.adapter=hh_rlhf or hh_rlhf_text"
        )
    completions, edges = same_kind(prompt, chosen, rejected), [(0, 1, margin_of(row))]
    return TextGroup(prompt, completions, edges, unused=tuple(unused), whole=is_whole)


def _keys_beside(prompt: Messages, given: Messages) -> list[str]:
    """The keys of a prompt that is not read, where the prompt that is read has none of them."""
    lost = set(unknown_keys(given)).difference(unknown_keys(prompt))
    return [f"{key} (of messages of prompt)" for key in sorted(lost)]


def _goes_on(prompt: Messages, chosen: Messages, rejected: Messages) -> bool:
    """Whether chosen and rejected begin where a prompt ends: with an answer, or after one."""
    if chosen[0]["role"] == "assistant":
        return True
    return prompt[-1]["role"] == "assistant" and not any(holds(side, prompt) for side in (chosen, rejected))


def holds(conversation: Messages, prompt: Text) -> bool:
    """Whether a conversation says all that a prompt says: its text, in whole words, in a message; or its
    messages in order."""
    if isinstance(prompt, str):
        words = re.compile(rf"(?<!\w){re.escape(prompt.strip())}(?!\w)", re.ASCII)
        return any(words.search(text_in(message)) for message in conversation)
    rest = iter(conversation)
    return all(any(_say_alike(message, x) for x in rest) for message in prompt)


def _words_of(message: dict[str, Any]) -> dict[str, Any]:
    """What a message says, alike for text in parts or as one and for arguments as an object or as JSON."""
    calls = message.get("tool_calls") or []
    names = [call.get("function", call).get("name") for call in calls]
    arguments = map(_arguments_as_text, arguments_in([message]))
    others = {key: message[key] for key in ("role", *THINKING) if message.get(key)}
    return {**others, "content": text_in(message), "tool_calls": list(zip(names, arguments, strict=True))}


def _arguments_as_text(arguments: Any) -> str:
    """Arguments as JSON text, alike for an object and for its text in any spacing."""
    parsed = object_in(arguments)
    return json.dumps(arguments if parsed is None else parsed)


def _split_conversations(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen, rejected): the messages that both conversations begin with are the prompt."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and _say_alike(chosen[shared], rejected[shared]):
        shared += 1
    shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    if shared == 0:
        role = chosen[0]["role"]
        hint = "" if role in ROLES else f"; the one who answers has the role assistant here, not {role}"
        raise UserError(f"chosen and rejected do not start with the same message, and no prompt fits{hint}")
    return chosen[:shared], chosen[shared:], rejected[shared:]


ROLES = {"system", "developer", "user", "assistant", *RESULTS}
"""The roles that messages usually have."""


def _say_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two messages agree in role and words; ids and other keys may differ, and so may the form of
    text and arguments."""
    return _words_of(one) == _words_of(other)


def same_kind(prompt: Text, *completions: Text, may_be_empty: bool = False) -> list[Text]:
    """The completions. Raises UserError unless prompt and completions are all text, or all messages of which
    completions may be; and for an empty answer, unless it was sampled and so may be empty."""
    if len({isinstance(x, str) for x in (prompt, *completions)}) > 1:
        raise UserError("prompt and completions must all be text or all be lists of messages")
    for completion in completions:
        if isinstance(completion, str) or isinstance(prompt, str):
            continue
        _check_roles(prompt, completion)
        if not (may_be_empty or _answers(completion[-1])):
            raise UserError("a completion ends with an empty message of the assistant")
    return list(completions)


def _check_roles(prompt: Messages, completion: Messages) -> None:
    """Raise UserError unless a completion ends with the assistant and goes on where the prompt ends."""
    roles = [message["role"] for message in completion]
    repeats = len(completion) > len(prompt) and all(map(_say_alike, prompt, completion))
    asks_twice = roles[0] in ("user", "system") and prompt[-1]["role"] in ("user", "system")
    if roles[-1] != "assistant" or repeats or asks_twice:
        raise UserError(
            f"a completion has the roles {', '.join(roles)}, after a prompt that ends with the role "
            f"{prompt[-1]['role']}; it must go on where the prompt ends, and end with the assistant"
        )


def _answers(message: dict[str, Any]) -> bool:
    return bool(text_in(message) or message.get("tool_calls"))


def text_or_messages(row: Mapping[str, Any], field: str, may_be_empty: bool = False) -> Text:
    """The text or the messages in a column. Raises UserError for anything else."""
    return as_text(present(row, field), field, may_be_empty)


def present(row: Mapping[str, Any], field: str) -> Any:
    """What a row has in a column. Raises UserError if it has nothing there."""
    if row.get(field) is None:
        raise UserError(f"{field}: is {'null' if field in row else 'missing'}")
    return row[field]


def as_text(value: Any, field: str, may_be_empty: bool = False) -> Text:
    """The value, if it is text or messages. Raises UserError that calls it `field`."""
    if isinstance(value, str):
        if not value and not may_be_empty:
            raise UserError(f"{field} is empty")
        return value
    if isinstance(value, list) and value:
        return [read_message(field, message) for message in value]
    kind = ", bytes that are no UTF-8" if isinstance(value, bytes) else ""
    raise UserError(f"{field}: expected text or a list of messages, got {value!r:.80}{kind}")


def with_system(group: TextGroup, system: Any) -> TextGroup:
    """The conversation after a system message of this text, if there is text. Raises UserError."""
    assert not isinstance(group.prompt, str)
    return replace(group, prompt=after_system(group.prompt, system))


def after_system(messages: Messages, system: Any) -> Messages:
    """The messages after a system message of this text, if there is text. Raises UserError if they begin with
    another one."""
    if system is None:
        return messages
    if not isinstance(system, str):
        raise UserError(f"system: expected text, got {system!r:.80}")
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if text_in(first) != system:
        raise UserError(f"system: the conversation begins with another system message, got {system!r:.80}")
    return messages


def with_edges(group: Any, edges: Sequence[tuple[int, int, float | None]]) -> Any:
    """A text or token group with these of its edges, and the completions that they compare."""
    selected = sorted({completion for edge in edges for completion in edge[:2]})
    new_index = {old: new for new, old in enumerate(selected)}
    return replace(
        group,
        completions=[group.completions[old] for old in selected],
        edges=[(new_index[chosen], new_index[rejected], margin) for chosen, rejected, margin in edges],
        **{
            name: [values[old] for old in selected]
            for name in ("labels", "completion_weights", "masks")
            if (values := getattr(group, name, []))
        },
    )


def texts_of(group: TextGroup) -> Iterator[str]:
    """Every text of a group, or of its messages."""
    for part in (group.prompt, *group.completions):
        yield from [part] if isinstance(part, str) else map(text_in, part)


def hash_of_prompt(group: TextGroup) -> int:
    """A hash in [0, 2^63) of the prompt's text, or of the completions if the prompt is empty."""
    content = json.dumps(group.prompt or group.completions, sort_keys=True)
    return xxhash.xxh3_64_intdigest(content.encode()) >> 1
