"""The loss head of a row that several ranks share, each of which has a slice of its tokens.

A loss depends on completions that lie in several slices, so it takes two passes over a rank's slice: the
log-probs of all slices are gathered and the loss is differentiated in them; then these gradients go back
through the slice. Summed over the group's ranks that is the gradient of the whole row, by the chain rule.
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
from madpo.trainer.head import OutputLayers, linear_loss, no_loss, of_tokens
from madpo.trainer.objectives.base import Need
from madpo.trainer.scoring_module import ScoredLoss
from madpo.trainer.sequence_parallel import SequenceGroup

BLOCK = 256
"""Scored tokens between which a chunk of logits may end."""


class SlicedHead(OutputLayers):
    """Scores of whole rows, and losses that are a rank's part of theirs.

    The hidden states are those of the slice's own tokens, (m, H); scores are those of all M tokens of the
    row, alike on every rank of the group. The value of a loss is that of a stand-in, which means nothing.
    """

    def __init__(self, *args: Any, sequence_group: SequenceGroup, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sequence_group = sequence_group

    def score(self, hidden: Tensor, ref_hidden: Tensor | None, batch: PackedBatch) -> TokenScores:
        with torch.no_grad():
            own = self._run(hidden, self._reference(ref_hidden), batch, no_loss).tokens
        whole = self.sequence_group.meet(own, own_tokens(batch), len(batch.targets))
        tokens = TokenScores(*whole)  # type: ignore[arg-type]
        known = batch.ref_token_logps
        return tokens if known is None else tokens._replace(ref_token_logps=known)

    def loss(self, hidden: Tensor, ref_hidden: Tensor | None, batch: PackedBatch) -> ScoredLoss:
        tokens = self.score(hidden, ref_hidden, batch)
        gradients = self._gradients(batch, tokens)
        # Only distributions have a gradient in what is formed with the reference.
        again = Need.DISTRIBUTIONS in self.objective.needs
        reference = self._reference(ref_hidden) if again else Reference()
        return ScoredLoss(self._run(hidden, reference, batch, linear_loss(gradients)).loss, tokens)

    def loss_from_gradients(self, hidden: Tensor, batch: PackedBatch, dloss_dlogps: Tensor) -> ScoredLoss:
        gradient = of_tokens(dloss_dlogps, batch)[own_tokens(batch)]
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
        """d(sum of the losses) / d(score), (m,) for each field of `tokens` that is there."""
        leaves = TokenScores(*(None if x is None else x.clone().requires_grad_() for x in tokens))  # type: ignore[arg-type]
        losses = self.objective.of_groups(batch.scored(leaves)).losses.sum()
        there = [name for name, leaf in leaves._asdict().items() if leaf is not None]
        gradients = torch.autograd.grad(
            losses, [getattr(leaves, name) for name in there], allow_unused=True, materialize_grads=True
        )
        own = own_tokens(batch)
        return TokenScores(**{name: each[own] for name, each in zip(there, gradients, strict=True)})


def own_tokens(batch: PackedBatch) -> Tensor:
    """(m,) which of the row's M scored tokens are in this rank's slice."""
    assert batch.own_tokens is not None, "a whole row has no slice"
    return batch.own_tokens


def _blocks(targets: Tensor) -> GroupLayout:
    """Split tokens into independent blocks, so that a chunk of logits may end between any two."""
    full, rest = divmod(len(targets), BLOCK)
    lengths = [BLOCK] * full + ([rest] if rest else [])
    return GroupLayout.alone(lengths, targets.device)
