"""Policy and frozen reference as one module: one engine, one forward, one loss."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from madpo.trainer.data.packing import PackedBatch
from madpo.trainer.head import PreferenceHead
from madpo.trainer.model.prefix_attention import SegmentTable
from madpo.trainer.objectives.base import Objective, Params


class PolicyWithReference(nn.Module):
    """Scores a packed batch under both models and hands the completion rows to the loss head.

    The reference has no gradient, no optimiser state and stays in evaluation mode.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: PreTrainedModel | None,
        objective: Objective,
        params: Params,
        max_rows: int,
    ) -> None:
        super().__init__()
        assert (reference is not None) or not objective.needs_reference
        self.policy = policy
        self.reference = reference
        if reference is not None:
            reference.requires_grad_(False).eval()
        self.head = PreferenceHead(
            output_weight(policy),
            None if reference is None else output_weight(reference),
            objective,
            params,
            max_rows,
            softcap=getattr(policy.config, "final_logit_softcapping", None),
        )

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss (), token_logps (M,), ref_token_logps (M,) or None)."""
        table = SegmentTable(batch.segments)
        hidden = scored_hidden(self.policy, batch, table)
        ref_hidden = None
        if self.reference is not None:
            with torch.no_grad():
                ref_hidden = scored_hidden(self.reference, batch, table)
        return self.head(hidden, ref_hidden, batch)


def scored_hidden(model: PreTrainedModel, batch: PackedBatch, table: SegmentTable) -> Tensor:
    """(M, H): the backbone's last hidden states at the positions that predict a completion token."""
    output: Any = model.base_model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        segments=table,
    )
    return output.last_hidden_state[0].index_select(0, batch.rows)


def output_weight(model: PreTrainedModel) -> nn.Parameter:
    """(V, H): the weight of the output embeddings. Raises ValueError for heads that do more."""
    head: Any = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__}: the output head is {type(head).__name__}, not a Linear")
    if head.bias is not None:
        raise ValueError(f"{type(model).__name__}: an output head with a bias is not supported")
    for key in ("logit_scale", "logits_scaling", "output_multiplier"):
        if getattr(model.config, key, None) not in (None, 1, 1.0):
            raise ValueError(f"{type(model).__name__}: scaled logits (config.{key}) are not supported")
    weight = head.weight
    assert isinstance(weight, nn.Parameter)
    return weight
