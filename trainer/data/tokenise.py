"""Text groups -> token groups: chat template, prompt boundary, end of sequence, truncation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from madpo.trainer.data.chat_template import NOW, notes_on, render, text_of
from madpo.trainer.data.masks import TrainOn, is_whole, mask_of, scored_messages
from madpo.trainer.data.plain_text import encode_texts, ends_with_special
from madpo.trainer.data.template_shape import TOOLS
from madpo.trainer.errors import UserError
from madpo.trainer.formats.chat_message import KNOWN, PREFIX, THINKING, WEIGHT, Messages, text_in
from madpo.trainer.formats.numbers import as_weight
from madpo.trainer.formats.read_row import RowRules
from madpo.trainer.formats.text_groups import Text, TextGroup


@dataclass(frozen=True)
class TokenRules:
    """Everything besides the tokenizer that decides the tokens of an example; part of the cache key."""

    max_length: int
    append_eos: Literal["auto", "always", "never"] = "auto"
    supervised: bool = False  # one completion per example, and no edges
    template_kwargs: dict[str, Any] = field(default_factory=dict, hash=False)  # an example's own win
    template_may_drop: tuple[str, ...] = ()  # roles and keys of messages that are not scored
    template_date: str = "2026-01-01"  # what templates take for the present
    train_on: TrainOn = "assistant"  # which messages of a completion are scored
    text_holds_special_tokens: bool = False  # what spells a special token in plain text is that token
    rows: RowRules = field(default_factory=RowRules)


@dataclass(frozen=True)
class TokenGroup:
    """A prompt and its completions as token ids. Edges are (chosen, rejected, margin or None)."""

    prompt: list[int]
    completions: list[list[int]]
    edges: list[tuple[int, int, float | None]]
    labels: list[int] = field(default_factory=list)  # 1 desirable, -1 undesirable, 0 neither; all or none
    edge_weights: list[float] = field(default_factory=list)  # factors on the edges' losses; all or none
    completion_weights: list[float] = field(default_factory=list)  # on those of completions; all or none
    masks: list[list[bool]] = field(default_factory=list)  # which tokens of completions are scored; []: all
    boundary_cut: int = 0  # prompt tokens that moved into the completion, as its text merged with them
    truncated: int = 0  # completions that were cut at their end
    equal: int = 0  # edges dropped, as chosen and rejected are the same tokens
    notes: tuple[str, ...] = ()  # what the chat template made of the conversation, where it is no plain copy
    problem: str = ""  # why the group cannot be trained on, or empty

    @property
    def scored(self) -> list[int]:
        """The number of scored tokens of each completion."""
        return [sum(mask) for mask in self.masks] if self.masks else [len(x) for x in self.completions]

    @property
    def whole_masks(self) -> list[list[bool]]:
        """The masks, also where all tokens are scored."""
        return self.masks or [[True] * len(completion) for completion in self.completions]


FILLS = "prompt fills max_length"


def tokenise(group: TextGroup, tokenizer: PreTrainedTokenizerBase, rules: TokenRules) -> TokenGroup:
    """Tokenise one group.

    A completion starts where the tokens of prompt + completion begin to differ from those of the prompt
    alone, behind their longest common prefix; at the same position for every completion of the group.
    Completions are cut to `max_length` at their end. An edge of equal tokens is dropped. A group that cannot
    be trained on says why in `problem`: its prompt fills `max_length`, or it has no edge left.
    """
    notes: dict[str, None] = {}
    prompt_only, wholes = _encode(group, tokenizer, rules, notes)
    start = min(_common_prefix(prompt_only, whole) for whole in wholes)
    is_moved = start < len(prompt_only) and _changes_the_prompt(group, tokenizer, rules)
    masks = _masks(group, wholes, tokenizer, rules, is_moved)
    if start == 0 and not group.prompt and len(wholes) == 1:
        start = 1  # plain text without BOS: the first token predicts the rest, as in any language model
    boundary_cut = max(len(prompt_only) - start, 0)
    if masks:  # these say to the token where the answers begin, also where a later turn changes the prompt
        start, boundary_cut = min([start, *(mask.index(True) for mask in masks if any(mask))]), 0
    prompt = wholes[0][:start]
    room = rules.max_length - start
    completion_tokens = slice(start, start + max(room, 0))
    completions = [whole[completion_tokens] for whole in wholes]
    masks = [mask[completion_tokens] for mask in masks]
    edges = [edge for edge in group.edges if completions[edge[0]] != completions[edge[1]]]
    edge_weights, completion_weights = _weights(group, edges)
    problem = ""
    if start == 0:
        problem = "prompt and completion merge into one token"
    elif any(len(whole) == start for whole in wholes):
        problem = "a completion has no tokens"
    elif room < 1:
        problem = FILLS
    elif group.edges and not edges:
        problem = "chosen and rejected are the same tokens"
    elif not all(map(any, masks)):
        problem = "no token of a completion is scored"
    elif rules.supervised and -1 in group.labels:
        problem = "labelled undesirable, and this objective imitates"
    return TokenGroup(
        prompt,
        completions,
        edges,
        group.labels or labels_of(edges, len(completions)),
        edge_weights,
        completion_weights,
        masks=needed(masks),
        boundary_cut=boundary_cut,
        truncated=sum(len(whole) > rules.max_length for whole in wholes),
        equal=len(group.edges) - len(edges),
        notes=tuple(notes),
        problem=problem,
    )


def needed(masks: list[list[bool]]) -> list[list[bool]]:
    """The masks; none if they leave nothing out."""
    return [] if all(map(all, masks)) else masks


def _weights(
    group: TextGroup, edges: Sequence[tuple[int, int, float | None]]
) -> tuple[list[float], list[float]]:
    """The weights of the edges that remain, and of the completions; both empty if the example has none.

    An edge has the example's weight, times the weights of its two completions where they have their own.
    """
    if group.weight is None and not group.completion_weights:
        return [], []
    whole = 1.0 if group.weight is None else group.weight
    own = group.completion_weights or [1.0] * len(group.completions)
    of_edges = [as_weight(whole * own[won] * own[lost], "weight of a pair") for won, lost, _ in edges]
    return of_edges, [whole * x for x in own]


def joined_weights(parts: Sequence[tuple[list[float], int]]) -> list[float]:
    """The weights of all parts, each given with the number it should have; 1 in place of a part without."""
    if not any(weights for weights, _ in parts):
        return []
    return [weight for weights, count in parts for weight in weights or [1.0] * count]


def labels_of(edges: list[tuple[int, int, float | None]], count: int) -> list[int]:
    """Labels by edges: 1 if a completion is more often chosen than rejected, -1 if less often, else 0."""
    if not edges:
        return []
    score = [0] * count
    for winner, loser, _ in edges:
        score[winner] += 1
        score[loser] -= 1
    return [(x > 0) - (x < 0) for x in score]


def encode_prompt(
    group: TextGroup, tokenizer: PreTrainedTokenizerBase, rules: TokenRules
) -> tuple[list[int], list[str]]:
    """The tokens of a group's prompt alone, with the header of the answer in a conversation; and what is to
    be said of what the template made of it.

    Raises UserError if the chat template leaves out what the prompt says; see `chat_template.notes_on`.
    """
    if isinstance(group.prompt, str):
        return encode_texts([group.prompt], tokenizer, rules.text_holds_special_tokens)[0], []
    options = _template_options(group, rules) | {
        "add_generation_prompt": _opens_an_answer(group),
        "continue_final_message": is_continued(group),
    }
    try:
        ids, rendering = render(group.prompt, tokenizer, options)
    except UserError as error:
        if "continue_final_message" in str(error):  # of transformers, which looks for the words in the text
            raise UserError(
                "the prompt ends with words of the assistant that the completion goes on with, and the chat "
                f"template does not write them as they are, got {text_in(group.prompt[-1])!r:.80}; end the "
                "prompt before them, and begin the completion with them"
            ) from error
        raise
    return ids, notes_on(rendering, len(group.prompt), rules.template_may_drop)


def _opens_an_answer(group: TextGroup) -> bool:
    """Whether an answer of its own follows the prompt."""
    assert not isinstance(group.prompt, str)
    others_spoke = group.prompt[-1]["role"] != "assistant"
    return others_spoke or (_first_speakers(group) <= {"assistant"} and not is_continued(group))


def is_continued(group: TextGroup) -> bool:
    """Whether completions continue the last message of the prompt, which is a conversation: words of the
    assistant, but no tool call, if a completion begins with the assistant too. In a whole conversation those
    are two messages."""
    last: Any = group.prompt[-1]
    if group.whole or last["role"] != "assistant" or "tool_calls" in last:
        return False
    return not group.completions or "assistant" in _first_speakers(group)


def _first_speakers(group: TextGroup) -> set[str]:
    return {completion[0]["role"] for completion in _conversations(group)}


def _encode(
    group: TextGroup, tokenizer: PreTrainedTokenizerBase, rules: TokenRules, notes: dict[str, None]
) -> tuple[list[int], list[list[int]]]:
    """The tokens of the prompt alone, and of the prompt with each completion; what is to be said of these is
    entered in `notes`."""
    if isinstance(group.prompt, str):
        # All in one call: most of a call's time is transformers' own.
        texts = [group.prompt, *(f"{group.prompt}{completion}" for completion in group.completions)]
        prompt, *wholes = encode_texts(texts, tokenizer, rules.text_holds_special_tokens)
    else:
        prompt, _ = encode_prompt(group, tokenizer, rules)
        wholes = [_encode_messages(group, x, tokenizer, rules, notes) for x in _conversations(group)]
    ended = zip(wholes, group.completions, strict=True)
    return prompt, [_with_eos(ids, completion, tokenizer, rules) for ids, completion in ended]


def _encode_messages(
    group: TextGroup,
    completion: Messages,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    notes: dict[str, None],
) -> list[int]:
    """The tokens of a conversation with this completion."""
    messages, first = _conversation(group, completion)
    ids, rendering = render(messages, tokenizer, _template_options(group, rules))
    scored = scored_messages(messages, first, rules.train_on)
    notes |= dict.fromkeys(notes_on(rendering, first, rules.template_may_drop, scored))
    if any(x.get(WEIGHT) == 1 and first + i not in scored for i, x in enumerate(messages[first:])):
        notes[NOT_THE_ASSISTANTS] = None
    return ids


def _with_eos(
    ids: list[int], completion: Text, tokenizer: PreTrainedTokenizerBase, rules: TokenRules
) -> list[int]:
    """The tokens with EOS behind them, where `append_eos` asks for it and the completion has no end yet."""
    is_text = isinstance(completion, str)
    if is_text and rules.text_holds_special_tokens and ends_with_special(completion, tokenizer):
        return ids
    if rules.append_eos == "always" and tokenizer.eos_token_id is None:
        raise UserError("data.append_eos: always, but the tokenizer has no EOS token; set auto or never")
    append = rules.append_eos == "always" or (rules.append_eos == "auto" and is_text)
    eos: Any = tokenizer.eos_token_id
    return [*ids, eos] if append and eos is not None and ids[-1:] != [eos] else ids


NOT_THE_ASSISTANTS = "weight 1 of a message that is not the assistant's: not trained on (data.train_on)"


def _conversations(group: TextGroup) -> list[Messages]:
    """The completions, which are lists of messages as the prompt is."""
    return [completion for completion in group.completions if not isinstance(completion, str)]


def _conversation(group: TextGroup, completion: Messages) -> tuple[Messages, int]:
    """The messages of a prompt and its completion, and the index of the completion's first; a message of the
    prompt that the completion continues is that one. Raises UserError for a completion that cannot."""
    assert not isinstance(group.prompt, str)
    if not is_continued(group):
        return group.prompt + completion, len(group.prompt)
    *prompt, begun = group.prompt
    if completion[0]["role"] != "assistant":
        raise UserError("the prompt ends with words of the assistant, so the completion goes on with them")
    return [*prompt, _joined(begun, completion[0]), *completion[1:]], len(prompt)


def _joined(begun: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """The message that these two are parts of. Raises UserError for thinking of the second, which would come
    before the words of the first, and for another key in which they disagree."""
    beside = {key: value for key, value in begun.items() if key != PREFIX}
    for key, value in rest.items():
        if (key in KNOWN and key not in THINKING) or value == beside.get(key):
            continue
        if key in beside:
            raise UserError(
                f"{key}: the completion goes on with the prompt's last message, and the two disagree, got "
                f"{beside[key]!r:.60} and {value!r:.60}"
            )
        if key in THINKING and value:
            raise UserError(
                f"{key}: the completion goes on with the prompt's last message, and thinking comes before "
                f"its words, got {value!r:.60}; end the prompt before that message"
            )
    return {**beside, **rest, "content": text_in(begun) + text_in(rest)}


def _changes_the_prompt(group: TextGroup, tokenizer: PreTrainedTokenizerBase, rules: TokenRules) -> bool:
    """Whether the template writes the prompt of a conversation otherwise once a completion follows, or more
    before the header of the answer.

    gpt-oss's leaves out the thinking of a call then, others end a turn only then. Where the tokens begin to
    differ is no boundary there.
    """
    if isinstance(group.prompt, str):
        return False
    options = _template_options(group, rules)
    alone = text_of(group.prompt, tokenizer, options | {"continue_final_message": is_continued(group)})
    opening = {"add_generation_prompt": True} if _opens_an_answer(group) else {}
    header = text_of(group.prompt, tokenizer, options | opening).removeprefix(alone) if opening else ""
    for completion in _conversations(group):
        whole = text_of(_conversation(group, completion)[0], tokenizer, options)
        rest = whole.removeprefix(alone)
        is_later = len(completion) == 1 and header in rest and not rest.startswith(header)
        if is_later or not whole.startswith(alone):
            return True
    return False


def _masks(
    group: TextGroup,
    wholes: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    is_moved: bool,  # tokens of the prompt stand behind those that all completions begin with
) -> list[list[bool]]:
    """Whether each token of prompt and completion is scored, for each completion; nothing if all are.

    A prompt has no scored tokens there.
    """
    completions = _conversations(group)
    if all(is_whole(completion, rules.train_on) for completion in completions) and not is_moved:
        return []
    options, masks = _template_options(group, rules), list[list[bool]]()
    for completion, whole in zip(completions, wholes, strict=True):
        messages, first = _conversation(group, completion)
        assert not isinstance(group.prompt, str)
        begun = "".join(map(text_in, group.prompt[first:]))
        mask = mask_of(messages, first, begun, rules.train_on, tokenizer, options)
        masks.append(mask + mask[-1:] * (len(whole) - len(mask)))  # an EOS that is appended is the answer's
    return masks


def _template_options(group: TextGroup, rules: TokenRules) -> dict[str, Any]:
    now = datetime.fromisoformat(rules.template_date).strftime
    return {TOOLS: group.tools or None, NOW: now, **rules.template_kwargs, **group.template_kwargs}


def _common_prefix(a: list[int], b: list[int]) -> int:
    if b[: len(a)] == a:  # nearly always, and found without a loop
        return len(a)
    differs = (index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differs, min(len(a), len(b)))
