"""Adapters: published data sets -> text groups. Each reads the columns of one known format.

Questions and answers become conversations, for the tokenizer's chat template. Texts that hold their own
format stay text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from madpo.trainer.errors import UserError
from madpo.trainer.formats import text_groups
from madpo.trainer.formats.chat_message import Messages, says_something
from madpo.trainer.formats.messages import (
    Row,
    answer,
    each,
    earlier_turns,
    one_of,
    pair,
    question,
    say,
    shared_turn,
    text_of,
    transcript,
)
from madpo.trainer.formats.numbers import finite
from madpo.trainer.formats.text_groups import TextGroup, after_system, holds, objects, ranked


@dataclass(frozen=True)
class Adapter:
    """How the examples of one format become groups."""

    name: str
    needs: tuple[tuple[str, ...], ...]  # required columns: one of each tuple
    source: str  # where the format is published
    makes: str  # what an example becomes
    uses: frozenset[str]  # all columns that it looks at
    read: Callable[[dict[str, Any]], TextGroup]  # raises UserError that names the field

    def missing(self, columns: set[str]) -> list[str]:
        """Required columns that are not among these."""
        return [" or ".join(names) for names in self.needs if not columns.intersection(names)]


ADAPTERS: dict[str, Adapter] = {
    name: Adapter(
        name,
        tuple((column,) for column in sorted(needed)),
        source="",
        makes="what `auto` finds by its columns",
        uses=frozenset(needed | text_groups.BESIDE.get(name, frozenset())),
        read=partial(text_groups.to_group, layout=name),
    )
    for name, needed in text_groups.LAYOUTS
}
"""Name -> adapter. First those of the plain layouts, which `auto` finds by their columns."""


def adapter(name: str, needs: str, source: str, makes: str, may_use: str = "") -> Callable[[Any], Any]:
    """Register a function example -> group. `needs` names columns; `a|b` is either of two. `may_use` names
    those that it also looks at."""

    def register(read: Callable[[dict[str, Any]], TextGroup]) -> Any:
        columns = tuple(tuple(names.split("|")) for names in needs.split())
        uses = frozenset(chain(*columns, may_use.split()))
        ADAPTERS[name] = Adapter(name, columns, source, makes, uses, read)
        return read

    return register


@adapter(
    "hh_rlhf",
    "chosen rejected",
    "Anthropic/hh-rlhf",
    "pair of conversations, from two transcripts; what they begin with is the prompt",
)
def _hh_rlhf(row: dict[str, Any]) -> TextGroup:
    turns = {name: transcript(row, name) for name in ("chosen", "rejected")}
    for name, messages in turns.items():
        if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
            raise UserError(f"{name}: the transcript does not end with words of the assistant")
    return text_groups.preference(turns)


@adapter(
    "hh_rlhf_text",
    "chosen rejected",
    "Anthropic/hh-rlhf",
    "pair of texts for models without a chat template; the prompt ends with the last `Assistant:`",
)
def _hh_rlhf_text(row: dict[str, Any]) -> TextGroup:
    mark = "\n\nAssistant:"
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    end = chosen.rfind(mark) + len(mark)
    if end < len(mark) or rejected[:end] != chosen[:end]:
        raise UserError("chosen and rejected: the transcripts differ before the last Assistant: of chosen")
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[end:].strip():
            raise UserError(f"{name}: the transcript does not end with words of the assistant")
    return pair(chosen[:end], chosen[end:], rejected[end:])


@adapter(
    "ultrafeedback_binarized",
    "prompt chosen rejected",
    "HuggingFaceH4/ultrafeedback_binarized, argilla/ultrafeedback-binarized-preferences-cleaned",
    "pair of conversations; the margin from `score_chosen` and `score_rejected`, or from `chosen-rating` "
    "and `rejected-rating`",
    may_use="score_chosen score_rejected chosen-rating rejected-rating",
)
def _ultrafeedback_binarized(row: dict[str, Any]) -> TextGroup:
    for ours, theirs in (("score_chosen", "chosen-rating"), ("score_rejected", "rejected-rating")):
        if row.get(ours) is None and row.get(theirs) is not None:
            row = {**row, ours: finite(row[theirs], theirs)}
    return text_groups.preference(row)


@adapter(
    "ultrafeedback",
    "instruction completions",
    "openbmb/UltraFeedback",
    "group of 4, by `fine-grained_score` (the mean of the four ratings under `annotations`), as "
    "`overall_score` is wrong in places; completions without a score are left out",
)
def _ultrafeedback(row: dict[str, Any]) -> TextGroup:
    rated = each(row, "completions", lambda x: (answer(text_of(x, "response")), _fine_grained(x)))
    scored = [(reply, score) for reply, score in rated if score is not None]
    prompt = question(text_of(row, "instruction"))
    group = ranked(prompt, [reply for reply, _ in scored], [score for _, score in scored])
    has_system = any(says_something(x.get("custom_system_prompt")) for x in row["completions"])
    return replace(group, unused=("custom_system_prompt (of completions)",)) if has_system else group


def _fine_grained(completion: Row) -> float | None:
    """The completion's score, else the mean of its rated aspects, else None."""
    if completion.get("fine-grained_score") is not None:
        return finite(completion["fine-grained_score"], "fine-grained_score")
    aspects = (completion.get("annotations") or {}).values()
    ratings = [aspect.get("Rating") for aspect in aspects if isinstance(aspect, dict)]
    numbers = [float(x) for x in ratings if x is not None and re.fullmatch(r"[1-5](\.0)?", str(x))]
    return sum(numbers) / len(numbers) if numbers else None


@adapter(
    "nectar",
    "prompt answers",
    "berkeley-nest/Nectar",
    "group of 7 conversations, by `rank`; no margins",
)
def _nectar(row: dict[str, Any]) -> TextGroup:
    prompt = transcript({"prompt": text_of(row, "prompt").rstrip(" ")}, "prompt")
    if prompt[-1] == say("assistant", ""):
        prompt = prompt[:-1]  # the open "Assistant: " would repeat the chat template's own header
    answers = each(row, "answers", lambda x: answer(text_of(x, "answer")))
    ranks = each(row, "answers", lambda x: finite(x.get("rank"), "rank"))
    return ranked(prompt, answers, [-rank for rank in ranks], with_margins=False)


def _pku(row: dict[str, Any], which: str) -> TextGroup:
    first = row.get(which)
    if first not in (0, 1):
        raise UserError(f"{which}: 0 or 1, got {first!r}")
    chosen, rejected = (answer(text_of(row, f"response_{i}")) for i in (int(first), 1 - int(first)))
    return pair(question(text_of(row, "prompt")), chosen, rejected)


for _name, _which, _makes in (
    ("pku_safe_rlhf", "better_response_id", "the more helpful answer is chosen"),
    ("pku_safe_rlhf_safety", "safer_response_id", "the safer answer is chosen"),
):
    adapter(
        _name,
        f"prompt response_0 response_1 {_which}",
        "PKU-Alignment/PKU-SafeRLHF",
        f"pair of conversations; {_makes}",
    )(partial(_pku, which=_which))


@adapter(
    "helpsteer2_preference",
    "prompt response_1 response_2 preference_strength",
    "nvidia/HelpSteer2 (its `preference` files)",
    "pair of conversations; the margin is the size of `preference_strength`, 0 prefers nothing",
)
def _helpsteer2(row: dict[str, Any]) -> TextGroup:
    """Later turns of a prompt begin with a marker, `<extra_id_1>User` or `<extra_id_1>Assistant`."""
    first, *turns = re.split(r"\n?<extra_id_1>(User|Assistant)\n", text_of(row, "prompt"))
    later = zip(turns[::2], turns[1::2], strict=True)
    prompt = [say("user", first), *(say(role.lower(), text) for role, text in later)]
    answers = [answer(text_of(row, name)) for name in ("response_1", "response_2")]
    strength = finite(row.get("preference_strength"), "preference_strength")
    return ranked(prompt, answers, [0.0, strength])


@adapter(
    "tulu_preferences",
    "chosen rejected",
    "allenai/llama-3.1-tulu-3-8b-preference-mixture and its parts",
    "pair of conversations; `prompt` repeats their last question and is not used",
    may_use="prompt",
)
def _tulu(row: dict[str, Any]) -> TextGroup:
    for name in ("chosen", "rejected"):
        if not isinstance(row.get(name), list):
            raise UserError(f"{name}: expected a list of messages, got {row.get(name)!r:.80}")
    group = text_groups.preference({**row, "prompt": None})
    asked = row.get("prompt")
    is_other = isinstance(asked, str) and not isinstance(group.prompt, str) and not holds(group.prompt, asked)
    return replace(group, odd=(OTHER_PROMPT,)) if is_other else group


OTHER_PROMPT = "prompt is not used, and says something else than the conversations begin with"


@adapter(
    "orca_pairs",
    "question|input chosen rejected",
    "Intel/orca_dpo_pairs, argilla/distilabel-intel-orca-dpo-pairs",
    "pair of conversations, with the text of `system` if there is one; the margin is the difference of "
    "the two numbers in `rating`, and equal ones prefer nothing",
    may_use="system rating",
)
def _orca_pairs(row: dict[str, Any]) -> TextGroup:
    prompt = question(text_of(row, "question", "input"), row.get("system"))
    chosen, rejected = (answer(text_of(row, name)) for name in ("chosen", "rejected"))
    rating = row.get("rating")
    if rating is None:
        return pair(prompt, chosen, rejected)
    if not isinstance(rating, list) or len(rating) != 2:
        raise UserError(f"rating: expected two numbers, got {rating!r:.80}")
    # `chosen` is the answer rated higher, in whichever order the judge saw the two.
    return ranked(prompt, [chosen, rejected], sorted((finite(x, "rating") for x in rating), reverse=True))


@adapter(
    "plain_text",
    "transcript",
    "red-team-attempts of Anthropic/hh-rlhf",
    "supervised: the last words of the assistant are the completion, what follows them is left out",
)
def _plain_text(row: dict[str, Any]) -> TextGroup:
    messages = transcript(row, "transcript")
    while messages and not (messages[-1]["role"] == "assistant" and messages[-1]["content"].strip()):
        messages.pop()
    if len(messages) < 2:
        raise UserError("transcript: no words of the assistant after words of the user")
    return text_groups.to_group({"messages": messages}, "messages")


@adapter(
    "kto",
    "prompt completion label",
    "trl-lib/kto-mix-14k",
    "unpaired: a completion and whether it is desirable",
)
def _kto(row: dict[str, Any]) -> TextGroup:
    return text_groups.to_group(row, "unpaired")


@adapter(
    "sharegpt",
    "conversations",
    "ShareGPT; with `chosen` and `rejected` as in LLaMA-Factory",
    "supervised, the last message is the completion; or pair, if `chosen` and `rejected` hold one message "
    "each; `system` and `tools` if they are there",
    may_use="system chosen rejected",
)
def _sharegpt(row: dict[str, Any]) -> TextGroup:
    turns = objects(row, "conversations")
    messages = [shared_turn(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    messages = after_system(messages, row.get("system") or None)
    if row.get("chosen") is None and row.get("rejected") is None:
        return text_groups.to_group({"messages": messages}, "messages")
    chosen, rejected = ([shared_turn(row.get(name), name)] for name in ("chosen", "rejected"))
    return pair(messages, chosen, rejected)


_ALPACA = "Below is an instruction that describes a task"
_ALPACA_END = "Write a response that appropriately completes the request.\n\n### Instruction:\n"


@adapter(
    "alpaca",
    "instruction output",
    "tatsu-lab/alpaca",
    "supervised text, in one of the two prompts of Alpaca: with `input` and without",
    may_use="input",
)
def _alpaca(row: dict[str, Any]) -> TextGroup:
    instruction, given = text_of(row, "instruction"), row.get("input") or ""
    if given:
        prompt = f"{_ALPACA}, paired with an input that provides further context. {_ALPACA_END}{instruction}"
        prompt += f"\n\n### Input:\n{text_of(row, 'input')}\n\n### Response:"
    else:
        prompt = f"{_ALPACA}. {_ALPACA_END}{instruction}\n\n### Response:"
    return TextGroup(prompt, [text_of(row, "output")], [])


_QUESTIONS = ("instruction", "question", "prompt", "query")
_ANSWERS = ("output", "response", "answer", "completion")


@adapter(
    "instruction_output",
    f"{'|'.join(_QUESTIONS)} {'|'.join(_ANSWERS)}",
    "Open-Orca/OpenOrca, meta-math/MetaMathQA, databricks/databricks-dolly-15k and their like",
    "supervised conversation, with the text of `system` or `system_prompt` if there is one, the turns of "
    "`history`, and the text of `input` or `context` on a new line after the question",
    may_use="system system_prompt input context history",
)
def _instruction_output(row: dict[str, Any]) -> TextGroup:
    return TextGroup(_instruction(row, *_QUESTIONS), [answer(text_of(row, *_ANSWERS))], [])


@adapter(
    "instruction_pairs",
    "instruction chosen rejected",
    "LLaMA-Factory's preference data in the Alpaca format",
    "pair of conversations, with `system`, the turns of `history`, and the text of `input` on a new line "
    "after the instruction",
    may_use="input system history",
)
def _instruction_pairs(row: dict[str, Any]) -> TextGroup:
    chosen, rejected = (answer(text_of(row, name)) for name in ("chosen", "rejected"))
    return pair(_instruction(row, "instruction"), chosen, rejected)


def _instruction(row: dict[str, Any], *names: str) -> Messages:
    """An instruction with what stands around it: system, earlier turns, an input."""
    asked = text_of(row, *names)
    if one_of(row, "input", "context"):
        asked += "\n" + text_of(row, "input", "context")
    *system, asking = question(asked, row.get(one_of(row, "system", "system_prompt") or "system"))
    return [*system, *earlier_turns(row), asking]
