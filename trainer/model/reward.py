"""A reward model: a language model's backbone, and one linear layer on each completion's last token."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from madpo.kernels.token_scores import TokenScores
from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.data.lengths import PositionBorder
from madpo.trainer.errors import UserError
from madpo.trainer.model.attention.prefix_sharing import SegmentTable, shares_rows
from madpo.trainer.model.backbone import last_hidden
from madpo.trainer.model.lora import in_use
from madpo.trainer.model.positions import position_borders
from madpo.trainer.objectives.build import BoundObjective
from madpo.trainer.scoring_module import Gradients, Mode, ReferenceScorer
from madpo.trainer.sequence_parallel import SequenceGroup


class RewardModel(nn.Module):
    """Scores every completion of a packed batch: a `ScoringModule` without a reference."""

    stats: Mapping[str, Tensor] = MappingProxyType({})
    reference: PreTrainedModel | None = None
    reference_scorer: ReferenceScorer | None = None
    sequence_group: SequenceGroup | None = None
    loss_of_tokens = False
    repeats_layers = False

    def __init__(self, policy: PreTrainedModel, objective: BoundObjective, has_new_layer: bool) -> None:
        super().__init__()
        self.policy, self.has_new_layer = policy, has_new_layer
        self.notes: list[str] = []
        layer = in_use(getattr(policy, "score", None))
        if not isinstance(layer, nn.Linear) or layer.bias is not None or layer.out_features != 1:
            raise UserError(
                f"{type(policy).__name__}: a reward model needs one linear layer `score` without a bias "
                f"over the backbone, found {layer}"
            )
        weight: Any = layer.weight
        self.head = RewardHead(weight, objective)

    @property
    def shares_rows(self) -> bool:
        """Whether sequences may share a packed row, and completions their prompt."""
        return shares_rows(self.policy)

    @property
    def borders(self) -> tuple[PositionBorder, ...]:
        """Lengths beyond which the model encodes positions otherwise."""
        return position_borders(self.policy)

    def forward(
        self, batch: PackedBatch, mode: Mode = Mode.LOSS, gradients: Gradients = None
    ) -> tuple[Tensor | None, ...]:
        """The loss (), and (M,) token scores: each completion's score at its last token and 0 before, so that
        they add up to its score as log-probs of tokens add up to its log-prob."""
        hidden = last_hidden(self.policy, batch, SegmentTable(batch.segments))
        return self.head(hidden.index_select(0, batch.ends), batch, mode)


class RewardHead(nn.Module):
    """Scores and loss in float32. The layer's weight is the model's own."""

    def __init__(self, weight: nn.Parameter, objective: BoundObjective) -> None:
        super().__init__()
        self.weight, self.objective = weight, objective
        self.ref_weight: nn.Parameter | None = None

    def forward(
        self,
        hidden: Tensor,  # (S, H) at the completions' last tokens
        batch: PackedBatch,
        mode: Mode,
    ) -> tuple[Tensor | None, ...]:
        assert mode in (Mode.LOSS, Mode.SCORE), "no objective of the global batch takes scores"
        scores = (hidden.float() @ self.weight.float().T)[:, 0]
        last_tokens = batch.seq_lengths.cumsum(0) - 1
        token_scores = torch.zeros(len(batch.targets), device=scores.device).index_put((last_tokens,), scores)
        tokens = TokenScores(token_scores)
        if mode is Mode.SCORE:
            return scores.new_zeros(()), *tokens.detach()
        losses = self.objective.of_groups(batch.scored(tokens)).losses
        return batch.scale * losses.sum().float(), *tokens.detach()
