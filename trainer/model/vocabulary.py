"""Models that know every token of the tokenizer: a check, and new vocabulary entries for those they lack."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from madpo.trainer.errors import UserError
from madpo.trainer.model.lora import is_adapted


def fit_vocabulary(model: PreTrainedModel, size: int, widen: bool) -> None:
    """Raise UserError unless the model knows the tokenizer's `size` tokens; add the missing ones if `widen`.

    The model may know more: vocabularies are often filled up, and no text has the extra tokens.
    """
    if widen:
        add_tokens(model, size)
    if size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens and the model only {model.config.vocab_size}: set "
            "model.resize_embeddings=true if tokens were added to the model's own tokenizer; if not, they do "
            "not belong together (model.tokenizer_name_or_path)"
        )


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
            "rows; add them to the base model first, by a run without peft"
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
