"""The two halves of a causal language model: the backbone, run on a packed row, and the output layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.errors import UserError
from madpo.trainer.head import LogitTransform, OutputHead
from madpo.trainer.model.attention.prefix_sharing import SegmentTable, shares_rows
from madpo.trainer.model.families import logit_scale
from madpo.trainer.model.lora import in_use
from madpo.trainer.model.padded_rows import run_rows


def scored_hidden(model: PreTrainedModel, batch: PackedBatch, table: SegmentTable) -> Tensor:
    """(M, H): the backbone's last hidden states at the positions that predict a completion token."""
    return last_hidden(model, batch, table).index_select(0, batch.scored_positions)


def last_hidden(model: PreTrainedModel, batch: PackedBatch, table: SegmentTable) -> Tensor:
    """(N, H): the backbone's last hidden states."""
    return run_backbone(model, batch, table).last_hidden_state[0]


def run_backbone(model: PreTrainedModel, batch: PackedBatch, table: SegmentTable, **options: Any) -> Any:
    """The backbone's output in the order of the packed row, also for a model that runs in padded rows.

    `options` are more keywords of the backbone's forward. The mask of ones hides nothing: without a mask
    transformers would split the row wherever positions restart, and cut completions off their prompt.
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
    """The model below the output layer: transformers' `base_model`, or the only model inside this one."""
    if model.base_model is not model:
        return model.base_model
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inside) != 1:
        raise UserError(f"{type(model).__name__}: no backbone under its head that could be run alone")
    return inside[0]


def output_head(model: PreTrainedModel) -> OutputHead:
    """The output layer's weight and bias, and its logits' scale and soft-cap by the model's config.

    Raises UserError for an output layer that is not linear. `check_head` compares with the model's logits.
    """
    head: Any = in_use(model.get_output_embeddings())
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__}: the output head is {type(head).__name__}, not a Linear")
    assert isinstance(head.weight, nn.Parameter)
    config: Any = model.config
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return OutputHead(head.weight, head.bias, LogitTransform(logit_scale(config), softcap))
