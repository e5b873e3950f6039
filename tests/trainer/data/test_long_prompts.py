"""Prompts that fill `data.max_length`, told without their tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness import make_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from madpo.trainer.data.long_prompts import is_longer, most_characters
from madpo.trainer.data.tokenise import FILLS
from madpo.trainer.data.tokenised_cache import load_groups


def test_what_is_longer_has_more_tokens_than_fit(tokenizer_folder):
    """Tokens of most characters, and characters that NFC joins, between blanks that do not count."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tokenizer_folder)
    most = most_characters(tokenizer, 8)
    assert most is not None
    longest = max(tokenizer.get_vocab(), key=len)
    for piece in (longest, "film", "\u1100\u1161\u11a8", "\U0001f600"):
        text = "  ".join([piece] * (1 + most // len(piece)))
        assert is_longer(text, most) and is_longer([{"role": "user", "content": text}], most)
        assert len(tokenizer(text)["input_ids"]) > 8
    assert not is_longer("x" * most + " " * most, most) and not is_longer("x" * 9 * most, None)
    assert not is_longer([{"role": "assistant", "content": "x" * 9 * most}], most)  # thinking may be left out


@pytest.mark.parametrize("kind", ["unknown words", "no bytes", "blanks are removed", "letters are removed"])
def test_of_a_tokenizer_that_leaves_characters_out_it_cannot_be_said(kind):
    alphabet = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    model: Any = models.WordPiece({"[UNK]": 0}, unk_token="[UNK]") if kind == "unknown words" else None
    backend = Tokenizer(model or models.BPE({"a": 0} if kind == "no bytes" else alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert (most_characters(tokenizer, 8) is None) == (kind in ("unknown words", "no bytes"))
    if kind == "blanks are removed":
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # pyright: ignore[reportAttributeAccessIssue]
    else:
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])  # pyright: ignore[reportAttributeAccessIssue]
    assert most_characters(PreTrainedTokenizerFast(tokenizer_object=backend), 8) is None


def test_such_a_row_is_dropped_as_any_that_fills_the_length(tmp_path, tokenizer_folder):
    rows = [{"prompt": "the film " * n, "chosen": " was good", "rejected": " bad"} for n in (1, 200, 200_000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {"model": {"model_name_or_path": "unused"}, "data": {"dataset_name": str(path), "max_length": 32}}
    config = make_config(tmp_path, tree)
    _, read = load_groups(config.data, "train", AutoTokenizer.from_pretrained(tokenizer_folder))
    report = read()
    assert report["groups"] == 1 and report["dropped"] == {FILLS: 2}
