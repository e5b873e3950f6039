"""The loss head for rows that several ranks share; each rank has a slice of a row's tokens.

A loss depends on completions that lie in several slices, so a rank passes over its slice twice. Pass 1
scores the slice; the group gathers all log-probs and differentiates the loss in them. Pass 2 sends these
gradients back through the slice. Summed over the group, that is the gradient of the whole row, by the
chain rule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from madpo.kernels.distribution_loss import TokensLoss
from madpo.kernels.layout import GroupLayout
from madpo.kernels.preference_loss import Reference
from madpo.kernels.token_scores import TokenScores
from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.head import OutputLayers, linear_loss, no_loss, spread_over_tokens
from madpo.trainer.objectives.base import Need
from madpo.trainer.scoring_module import ScoredLoss
from madpo.trainer.sequence_parallel import SequenceGroup

BLOCK = 256
"""Scored tokens of a block; a chunk of logits ends where a block does."""


class SlicedHead(OutputLayers):
    """Scores of whole rows, and this rank's share of their losses.

    Hidden states are those of the slice's own scored tokens, (m, H). Scores are those of all M scored
    tokens of the row, equal on every rank of the group. A loss has the right gradient; its value has no
    meaning.
    """

    def __init__(self, *args: Any, sequence_group: SequenceGroup, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sequence_group = sequence_group

    def score(self, hidden: Tensor, ref_hidden: Tensor | None, batch: PackedBatch) -> TokenScores:
        with torch.no_grad():
            own = self._run(hidden, self._reference(ref_hidden), batch, no_loss).tokens
        whole = self.sequence_group.gather(own, own_tokens(batch), len(batch.targets))
        tokens = TokenScores(*whole)  # type: ignore[arg-type]
        cached = batch.ref_token_logps
        return tokens if cached is None else tokens._replace(ref_token_logps=cached)

    def loss(self, hidden: Tensor, ref_hidden: Tensor | None, batch: PackedBatch) -> ScoredLoss:
        tokens = self.score(hidden, ref_hidden, batch)
        gradients = self._gradients(batch, tokens)
        # The gradient of a token's log-prob needs no reference; that of a KL of distributions does.
        needs_reference = Need.DISTRIBUTIONS in self.objective.needs
        reference = self._reference(ref_hidden) if needs_reference else Reference()
        return ScoredLoss(self._run(hidden, reference, batch, linear_loss(gradients)).loss, tokens)

    def loss_from_gradients(self, hidden: Tensor, batch: PackedBatch, dloss_dlogps: Tensor) -> ScoredLoss:
        gradient = spread_over_tokens(dloss_dlogps, batch)[own_tokens(batch)]
        return self._run(hidden, Reference(), batch, linear_loss(TokenScores(gradient)))

    def _reference(self, hidden: Tensor | None) -> Reference:
        return Reference() if hidden is None else Reference(hidden, self.ref_weight, self.ref_bias)

    def _run(self, hidden: Tensor, reference: Reference, batch: PackedBatch, loss: TokensLoss) -> ScoredLoss:
        targets = batch.targets[own_tokens(batch)]
        return self.run_kernels(hidden, reference, targets, _blocks(targets), loss, batch.scale)

    def _gradients(
        self,
        batch: PackedBatch,
        tokens: TokenScores,  # (M,)
    ) -> TokenScores:
        """d(sum of losses) / d(score), one (m,) tensor for each field of `tokens` that is set."""
        leaves = TokenScores(*(None if x is None else x.clone().requires_grad_() for x in tokens))  # type: ignore[arg-type]
        losses = self.objective.of_groups(batch.scored(leaves)).losses.sum()
        fields = [name for name, leaf in leaves._asdict().items() if leaf is not None]
        gradients = torch.autograd.grad(
            losses, [getattr(leaves, name) for name in fields], allow_unused=True, materialize_grads=True
        )
        own = own_tokens(batch)
        return TokenScores(**{name: each[own] for name, each in zip(fields, gradients, strict=True)})


def own_tokens(batch: PackedBatch) -> Tensor:
    """(m,) the indices, among the row's M scored tokens, of those in this rank's slice."""
    assert batch.own_tokens is not None, "a whole row has no slice"
    return batch.own_tokens


def _blocks(targets: Tensor) -> GroupLayout:
    """Split tokens into independent blocks, so that a chunk of logits may end between any two."""
    full, rest = divmod(len(targets), BLOCK)
    lengths = [BLOCK] * full + ([rest] if rest else [])
    return GroupLayout.alone(lengths, targets.device)
