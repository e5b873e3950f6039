"""The tokens that a model has embeddings for, and new embeddings for those that it lacks."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from madpo.trainer.data.known_tokens import largest_id
from madpo.trainer.errors import UserError
from madpo.trainer.model.lora import StoredAdapter, is_adapted


def vocabulary_note(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A note for the user if the tokenizer is larger than the model; None if the model knows all tokens."""
    known, largest = model.config.vocab_size, largest_id(tokenizer)
    if largest < known:
        return None
    return (
        f"the tokenizer has {largest + 1} tokens and the model's embedding {known} rows; it stays as it is, "
        "and a row of the data that has one of the other tokens is refused"
    )


def vocabulary_of(config: PreTrainedConfig) -> int | None:
    """The number of tokens that a model of this config has embeddings for; None if it does not say."""
    try:
        return getattr(config.get_text_config(), "vocab_size", None)
    except ValueError:  # it has several language models
        return None


def embedding_rows(adapter: StoredAdapter, known: int) -> int:
    """The vocabulary that an adapter was trained with, on a base model that knows `known` tokens.

    An adapter that trains whole copies of embedding and output layer (`modules_to_save`) may have more rows
    in them than its base. Nothing else that it stores is as long. Raises UserError for embeddings that were
    stored beside the adapter as a part of the base model.
    """
    longer = {name: rows for name, rows in adapter.lengths.items() if rows > known}
    whole = set(adapter.config.modules_to_save or [])
    for name in longer:
        if name.rpartition(".")[0].rpartition(".")[2] not in whole:
            raise UserError(
                f"{adapter.name}: the adapter holds {name} of {longer[name]} rows, a part of its base model, "
                f"which has {known}; merge it with peft (merge_and_unload) after resize_token_embeddings"
                f"({longer[name]}), and name the merged model"
            )
    return max(longer.values(), default=known)


@torch.no_grad()
def add_tokens(model: PreTrainedModel, size: int) -> None:
    """Widen embedding and output layer, tied or not, to `size` tokens if they have fewer. New entries are the
    mean of the old ones: no draw, so that policy, reference and all ranks agree.

    Source of the mean: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    Raises UserError for a model with an adapter.
    """
    import deepspeed

    old_size = model.config.vocab_size
    if size <= old_size:
        return
    if is_adapted(model):
        raise UserError(
            "model.resize_embeddings: an adapter is put on its base model again, which would lack the new "
            "rows; leave the key out if no row of the data has the new tokens (one that has is named), or "
            "add them to the base model first, by a run without peft"
        )
    model.resize_token_embeddings(size, mean_resizing=False)
    output: Any = model.get_output_embeddings()
    weights: list[Any] = [model.get_input_embeddings().weight]
    if output is not None:
        weights += [output.weight, getattr(output, "bias", None)]
    for weight in weights:
        if weight is not None:
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight[old_size:] = weight[:old_size].float().mean(0)
