"""The tokenizer of a run, and the token that it pads with."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from madpo.trainer.config.model import ModelConfig
from madpo.trainer.errors import UserError
from madpo.trainer.model.foreign_code import NO_CODE, reason_of

FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
"""Patterns of the files that a tokenizer is kept in."""


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that the config names, or else the model's. Raises UserError if there is none."""
    key = "model.tokenizer_name_or_path" if model.tokenizer_name_or_path else "model.model_name_or_path"
    name = model.tokenizer_name_or_path or model.model_name_or_path
    assert name is not None
    revision = None if model.tokenizer_name_or_path else model.model_revision
    folder = Path(name)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in FILES):
        raise UserError(
            f"{key}: {name} holds no tokenizer; set model.tokenizer_name_or_path to the model that it was "
            "made of"
        )
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, **NO_CODE)
    except Exception as error:  # tokenizers raises it bare
        raise UserError(f"{key}: no tokenizer could be loaded from {name!r}: {reason_of(error)}") from error


def padding_token(tokenizer: PreTrainedTokenizerBase, known: int) -> int:
    """A token to pad with other than EOS: transformers' classifiers score the last token that is no padding.

    It is one of the `known` that the model has embeddings for. Raises UserError if the tokenizer has none.
    """
    names = ("pad_token_id", "unk_token_id", "bos_token_id")
    for token in (getattr(tokenizer, name) for name in names):
        if token is not None and token < known and token != tokenizer.eos_token_id:
            return token
    raise UserError(
        "a reward model needs a tokenizer with a pad token that is not its EOS token, or with an UNK or BOS "
        "token to take its place (model.tokenizer_name_or_path)"
    )
