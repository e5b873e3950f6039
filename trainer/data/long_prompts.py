"""Prompts that are too long for `data.max_length` whatever their tokens: told by their characters alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from madpo.trainer.formats.chat_message import text_in
from madpo.trainer.formats.text_groups import Text

COMPOSED = 4
"""The most characters that NFC makes one of."""


def most_characters(tokenizer: PreTrainedTokenizerBase, max_length: int) -> int | None:
    """The number of characters, blanks apart, above which a text has more than `max_length` tokens.

    None for a tokenizer of which that cannot be said: it may leave characters out, or make one token of any
    number of unknown ones. Blanks do not count, since an added token may swallow any number beside it.
    """
    if not _keeps_characters(tokenizer):
        return None
    longest = max(map(len, tokenizer.get_vocab()))  # a byte has a letter there, so none holds more characters
    return max_length * longest * COMPOSED


def is_longer(prompt: Text, most: int | None) -> bool:
    """Whether a prompt has more than `most` characters, blanks apart, that no chat template leaves out: those
    of the user, since a template that leaves some out is refused."""
    texts = [prompt] if isinstance(prompt, str) else [text_in(x) for x in prompt if x["role"] == "user"]
    if most is None or sum(map(len, texts)) <= most:
        return False
    return sum(len(word) for text in texts for word in text.split()) > most


def _keeps_characters(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    parts: dict[str, Any] = json.loads(backend.to_str())
    model, vocabulary = parts["model"], tokenizer.get_vocab()
    has_bytes = model.get("byte_fallback", False) or vocabulary.keys() >= set(ByteLevel.alphabet())
    return (
        model["type"] == "BPE"
        and has_bytes
        and all(map(_keeps_letters, _steps(parts["normalizer"])))
        and all(map(_keeps_pieces, _steps(parts["pre_tokenizer"])))
    )


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer one by one."""
    if step is None:
        return
    inner = step.get("normalizers", step.get("pretokenizers"))
    yield from (step,) if inner is None else (each for part in inner for each in _steps(part))


def _keeps_letters(normalizer: dict[str, Any]) -> bool:
    replaces_blanks = normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "}
    return normalizer["type"] in ("NFC", "Prepend") or replaces_blanks


def _keeps_pieces(pre_tokenizer: dict[str, Any]) -> bool:
    if pre_tokenizer["type"] == "Split":
        return pre_tokenizer["behavior"] != "Removed"
    return pre_tokenizer["type"] in ("ByteLevel", "Digits", "Metaspace")
