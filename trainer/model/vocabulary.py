"""That models have a row for every token of the tokenizer, by refusal or by rows for those that lack one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from madpo.trainer.errors import UserError


def fit_vocabulary(
    policy: PreTrainedModel, reference: PreTrainedModel | None, size: int, widen: bool
) -> None:
    """Make sure that both models know the tokenizer's `size` tokens, and as many as each other.

    A model may know more: rows that fill a vocabulary up are common, and no text has their tokens.
    Raises ValueError.
    """
    for model in (policy, reference):
        if model is not None and widen and model.config.vocab_size < size:
            add_rows(model, size)
    if size > policy.config.vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens and the model only {policy.config.vocab_size}: set "
            "model.resize_embeddings=true if tokens were added to the model's own tokenizer; if not, they do "
            "not belong together (model.tokenizer_name_or_path)"
        )
    if reference is not None and reference.config.vocab_size != policy.config.vocab_size:
        raise UserError(
            f"policy and reference have vocabularies of {policy.config.vocab_size} and "
            f"{reference.config.vocab_size} tokens; the reference must be a model with the same tokenizer "
            "(model.ref_model_name_or_path)"
        )


@torch.no_grad()
def add_rows(model: PreTrainedModel, size: int) -> None:
    """Widen embedding and output head, tied or not, to `size` tokens. The new ones are the mean of the old:
    no draw, so that policy, reference and all ranks agree.

    Source of the mean: Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models".
    """
    import deepspeed

    known = model.config.vocab_size
    model.resize_token_embeddings(size, mean_resizing=False)
    output: Any = model.get_output_embeddings()
    weights: list[Any] = [model.get_input_embeddings().weight]
    if output is not None:
        weights += [output.weight, getattr(output, "bias", None)]
    for weight in weights:
        if weight is not None:
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight[known:] = weight[:known].float().mean(0)
