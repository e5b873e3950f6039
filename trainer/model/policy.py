"""Policy and frozen reference as one module: one engine, one forward, one loss."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from madpo.trainer.data.packing import PackedBatch, pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError
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
        raise UserError(f"{type(model).__name__}: the output head is {type(head).__name__}, not a Linear")
    if head.bias is not None:
        raise UserError(f"{type(model).__name__}: an output head with a bias is not supported")
    for key in ("logit_scale", "logits_scaling", "output_multiplier"):
        if getattr(model.config, key, None) not in (None, 1, 1.0):
            raise UserError(f"{type(model).__name__}: scaled logits (config.{key}) are not supported")
    weight = head.weight
    assert isinstance(weight, nn.Parameter)
    return weight


@torch.no_grad()
def refuse_unless_packing_is_exact(model: PreTrainedModel, device: torch.device) -> None:
    """Raise ValueError for a model in which packing changes what a completion's tokens see.

    Two groups of random tokens are scored packed and each completion alone. Layers that carry a state
    along the row, or take positions from the row, give themselves away by far more than rounding.
    """
    random = np.random.default_rng(0)
    high = min(model.config.vocab_size, 1000)
    draw = lambda count: random.integers(0, high, count).tolist()  # noqa: E731
    groups = [TokenGroup(draw(7), [draw(6), draw(9)], []) for _ in range(2)]
    alone = [TokenGroup(group.prompt, [c], []) for group in groups for c in group.completions]

    def hidden(batch: PackedBatch) -> Tensor:
        batch = batch.to(device)
        return scored_hidden(model, batch, SegmentTable(batch.segments)).float()

    packed = hidden(pack(groups))
    single = torch.cat([hidden(pack([group])) for group in alone])
    error = float((packed - single).norm() / single.norm())
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    if not error < tolerance:
        raise UserError(
            f"{type(model).__name__}: packed scores differ from single ones by {error:.2g} (relative); a "
            "model whose layers carry a state along the sequence cannot share a row between groups"
        )
