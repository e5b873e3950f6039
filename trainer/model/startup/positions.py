"""Compare the lengths of the data, and of what the checks score, with a model's positions."""

from __future__ import annotations

import math

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from madpo.trainer.data.groups import TokenGroups
from madpo.trainer.errors import UserError


def check_positions(model: PreTrainedModel, groups: TokenGroups) -> str | None:
    """A note for the user if a sequence is longer than the model's positions; None if all fit.

    Raises UserError for a model that has no others, because they are learned.
    """
    positions = _positions(model)
    long = np.flatnonzero(groups.counts.lengths > positions)  # with all completions of a prompt together
    longest = int(groups.shapes(long).rows.max()) if len(long) else 0
    if longest <= positions:
        return None
    text = f"the longest sequence has {longest} tokens, and the model was made for {positions:.0f} positions"
    _refuse_learned(model, text)
    return f"{text}; it may predict badly beyond them (data.max_length={positions:.0f} cuts there)"


def check_max_length(model: PreTrainedModel, max_length: int) -> None:
    """Raise UserError if a sequence of `max_length` tokens has more than the model's learned positions; for a
    stream, whose lengths are not known."""
    positions = _positions(model)
    if max_length > positions:
        text = f"sequences may have {max_length} tokens, and the model was made for {positions:.0f} positions"
        _refuse_learned(model, text)


NAMES = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_length")
"""What configs call the number of positions; transformers maps GPT-2's `n_positions` and others to the first.
MPT has the second, Bloom's published configs the last."""

FIXED_BIAS = {"mpt"}
"""Families whose attention adds a bias that is made for this many positions, and no more."""


def _positions(model: PreTrainedModel) -> float:
    """The positions that the model was made for; infinity if its config does not say."""
    config = model.config.get_text_config()
    given = (getattr(config, name, None) for name in NAMES)
    return next((number for number in given if isinstance(number, int)), math.inf)


def _refuse_learned(model: PreTrainedModel, text: str) -> None:
    positions = int(_positions(model))
    if _are_all(model, positions):
        raise UserError(f"data.max_length: {text}; set data.max_length={positions}, or use another model")


def within_positions(model: PreTrainedModel, tokens: int) -> int:
    """The length of a check's sequence: `tokens`, or the model's positions if it has fewer."""
    return int(min(tokens, _positions(model)))


def _are_all(model: PreTrainedModel, positions: int) -> bool:
    """Whether the model has a table of its positions, or of biases for them. OPT's has two more rows than
    positions."""
    if model.config.get_text_config().model_type in FIXED_BIAS:
        return True
    words = model.get_input_embeddings()
    tables = (part for part in model.modules() if isinstance(part, nn.Embedding) and part is not words)
    return any(table.num_embeddings in (positions, positions + 2) for table in tables)
