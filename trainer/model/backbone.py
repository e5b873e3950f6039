"""The two halves of a causal language model: the backbone on a packed row, and the output layer above it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.errors import UserError
from madpo.trainer.head import LogitTransform, OutputHead
from madpo.trainer.model.attention.prefix_sharing import SegmentTable, shares_rows
from madpo.trainer.model.lora import in_use
from madpo.trainer.model.padded_rows import run_rows


def scored_hidden(model: PreTrainedModel, batch: PackedBatch, table: SegmentTable) -> Tensor:
    """(M, H): the backbone's last hidden states at the positions that predict a completion token."""
    return last_hidden(model, batch, table).index_select(0, batch.scored_positions)


def last_hidden(model: PreTrainedModel, batch: PackedBatch, table: SegmentTable) -> Tensor:
    """(N, H): the backbone's last hidden states."""
    return run_backbone(model, batch, table).last_hidden_state[0]


def run_backbone(model: PreTrainedModel, batch: PackedBatch, table: SegmentTable, **options: Any) -> Any:
    """The backbone's output for a packed row; of a model that cannot share one, in the packed order.

    A mask that hides nothing keeps transformers from taking the row for sequences of their own by its
    positions, which would break completions off their prompt.
    """
    if not shares_rows(model):
        return run_rows(backbone(model), batch, **options)
    return backbone(model)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=torch.ones_like(batch.input_ids)[None],
        use_cache=False,
        segments=table,
        **options,
    )


def backbone(model: PreTrainedModel) -> nn.Module:
    """What is under the head: transformers' base_model, or the one model inside where that names none."""
    if model.base_model is not model:
        return model.base_model
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inside) != 1:
        raise UserError(f"{type(model).__name__}: no backbone under its head that could be run alone")
    return inside[0]


def output_head(model: PreTrainedModel) -> OutputHead:
    """What the model does after its last hidden states, as far as its config tells.

    Raises UserError for an output head that is no linear layer. `check_head` finds out
    whether there is more to it.
    """
    head: Any = in_use(model.get_output_embeddings())
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__}: the output head is {type(head).__name__}, not a Linear")
    assert isinstance(head.weight, nn.Parameter)
    config: Any = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    # One family multiplies by what the others divide by.
    scale *= scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return OutputHead(head.weight, head.bias, LogitTransform(scale, softcap))
