"""Plain text -> tokens, and the special tokens that are spelled out in text."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from transformers import PreTrainedTokenizerBase

from madpo.trainer.formats.chat_message import text_in
from madpo.trainer.formats.text_groups import TextGroup, texts_of


def encode_texts(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, holds_special: bool = False
) -> list[list[int]]:
    """The tokens of each plain text, after BOS if the tokenizer begins texts with it.

    Text is data: a special token spelled out in it stays text, unless `holds_special`. Then it is that token,
    and there is no second BOS.
    """
    if holds_special:
        encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]  # type: ignore[assignment]
        opening: list[int] = tokenizer("")["input_ids"][:1]  # type: ignore[assignment]
        if opening != [tokenizer.bos_token_id]:
            return encoded
        return [ids if ids[:1] == opening else opening + ids for ids in encoded]
    encoded = tokenizer(texts, split_special_tokens=True)["input_ids"]  # type: ignore[assignment]
    # Some tokenizers end every text with EOS, the prompt too. Whether there is one is up to append_eos.
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokenizer's special tokens as they are spelled, longest first."""
    special = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted(special, key=len, reverse=True)


def special_spellings(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """A pattern that matches the tokenizer's special tokens spelled out in text; None if it has none."""
    special = special_tokens(tokenizer)
    return re.compile("|".join(map(re.escape, special))) if special else None


def ends_with_special(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the last words of a text spell out a special token."""
    return text.rstrip().endswith(tuple(special_tokens(tokenizer)))


TURN_MARKS = re.compile(
    r"<\|\w+\|>|<\uff5c[^<>\uff5c\s]+\uff5c>|<(?:start|end)_of_turn>|<\|turn>|<turn\|>|\[/?INST\]|"
    r"</s>(?=\s*(?:\Z|USER:|<s>|\[INST\]))"
)
"""How chat templates of many families mark turns; U+FF5C is DeepSeek's bar. `</s>` is HTML too, and not so
where a turn ends."""


def foreign_marks(group: TextGroup, known: Collection[str]) -> list[str]:
    """Marks of turns in plain text, as of a rendered template, that are no tokens of the tokenizer."""
    return sorted(_marks_in(x for x in (group.prompt, *group.completions) if isinstance(x, str)) - set(known))


def marks_in_messages(group: TextGroup) -> list[str]:
    """Marks of turns in what messages say, as of a rendered template."""
    parts = (x for x in (group.prompt, *group.completions) if not isinstance(x, str))
    return sorted(_marks_in(text_in(message) for messages in parts for message in messages))


def _marks_in(texts: Iterable[str]) -> set[str]:
    return {mark for text in texts if "<" in text or "[" in text for mark in TURN_MARKS.findall(text)}


def spells_special(group: TextGroup, spellings: re.Pattern[str] | None) -> bool:
    """Whether a text of the group spells out a special token. In messages that text becomes the token; in
    plain text it stays text, unless `data.text_holds_special_tokens` says otherwise."""
    return spellings is not None and any(spellings.search(text) for text in texts_of(group))
