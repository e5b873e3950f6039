"""Token ids that occur in the data and for which the model has no embedding."""

from __future__ import annotations

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from madpo.trainer.data.dataset import LARGEST_ID, Columns


def lacks_tokens(tokenizer: PreTrainedTokenizerBase, known: int | None) -> bool:
    """Whether a model of `known` tokens (None: not known) lacks embeddings for some of the tokenizer's."""
    return known is not None and known <= largest_id(tokenizer)


def with_known_tokens(
    table: datasets.Dataset,  # a row for each example, as tokenised
    columns: Columns,  # stored with it
    tokenizer: PreTrainedTokenizerBase,
    known: int | None,  # ids below it have an embedding; None: not known
) -> datasets.Dataset:
    """The table, in which an example with a token that the model has no embedding for cannot be read.

    A tokenizer that is larger than its model is no fault as long as no example has the tokens: Gemma 3's
    names an image that its text models do not know.
    """
    if known is None or not lacks_tokens(tokenizer, known):
        return table
    largest = columns(LARGEST_ID)
    too_large = np.flatnonzero(largest >= known)
    if not len(too_large):
        return table
    problems, unreadable = table["problem"][:], table["unreadable"][:]
    rows = [int(row) for row in too_large if not problems[row]]
    if not rows:
        return table
    for row in rows:
        unreadable[row] = True
        problems[row] = (
            f"{unknown_token(int(largest[row]), tokenizer, known)}; set model.resize_embeddings=true if "
            "tokens were added to the model's own tokenizer; if not, they do not belong together "
            "(model.tokenizer_name_or_path)"
        )
    marked = table.remove_columns(["problem", "unreadable"])
    marked = marked.add_column("problem", problems).add_column("unreadable", unreadable)  # pyright: ignore[reportCallIssue]
    return marked.select_columns(table.column_names)


def unknown_token(token: int, tokenizer: PreTrainedTokenizerBase, known: int) -> str:
    """The beginning of a message about a token without an embedding."""
    text = tokenizer.convert_ids_to_tokens(token)
    return f"token {token} ({text!r}) has no row in the model's embedding, which has {known}"


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id that the tokenizer gives. Added tokens may leave gaps, so that it is not the count."""
    return max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder, 0)
