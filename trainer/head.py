"""The loss head: hidden states in, loss and log-probs out. It and `sliced_head.py` alone launch kernels."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from madpo.kernels.distribution_loss import TokensLoss, distribution_loss
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import GroupLayout, GroupRange
from madpo.kernels.preference_loss import Reference, preference_loss
from madpo.kernels.primitives import Impl
from madpo.kernels.token_scores import TokenScores
from madpo.kernels.transform import IDENTITY, LogitTransform
from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.errors import UserError
from madpo.trainer.objectives.base import Need
from madpo.trainer.objectives.build import BoundObjective
from madpo.trainer.scoring_module import Gradients, Mode, ScoredLoss

__all__ = ["Impl", "LogitTransform", "OutputHead", "OutputLayers", "PreferenceHead"]


def check_impl(impl: Impl) -> None:
    """Raise UserError, before a model is loaded, for kernels that this machine cannot run."""
    on_gpu = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    if impl == "triton" and not on_gpu:
        raise UserError("train.head_impl: triton runs on GPUs only, and there is none here; set auto")


@dataclass(frozen=True)
class OutputHead:
    """How a model turns hidden states into logits."""

    weight: nn.Parameter  # (V, H)
    bias: nn.Parameter | None = None  # (V,)
    transform: LogitTransform = IDENTITY


class OutputLayers(nn.Module, ABC):
    """The output layers of policy and reference; their weights are shared with the models.

    A module of its own, so that ZeRO-3 gathers the two weights around its forward and backward only.
    `PreferenceHead` computes on whole packed rows, `SlicedHead` on a rank's slice of a row.
    """

    def __init__(
        self,
        policy: OutputHead,
        reference: OutputHead | None,
        objective: BoundObjective,
        budget_bytes: int,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        assert reference is None or reference.transform == policy.transform
        self.weight, self.bias, self.transform = policy.weight, policy.bias, policy.transform
        self.ref_weight = reference.weight if reference else None
        self.ref_bias = reference.bias if reference else None
        self.objective = objective
        self.budget_bytes = budget_bytes
        self.impl: Impl = impl

    def forward(
        self,
        hidden: Tensor,  # (M, H) of the policy, at the positions that predict the batch's own targets
        ref_hidden: Tensor | None,  # (M, H)
        batch: PackedBatch,
        mode: Mode = Mode.LOSS,
        gradients: Gradients = None,
    ) -> tuple[Tensor | None, ...]:
        """The loss (), then the fields of `TokenScores`, as a plain tuple; `mode` says what is computed."""
        out = self._run_mode(hidden, ref_hidden, batch, mode, gradients)
        return out.loss, *out.tokens

    def _run_mode(
        self,
        hidden: Tensor,  # (M, H)
        ref_hidden: Tensor | None,  # (M, H)
        batch: PackedBatch,
        mode: Mode,
        gradients: Gradients,
    ) -> ScoredLoss:
        if mode is Mode.FROM_GRADIENTS:
            assert isinstance(gradients, Tensor)
            return self.loss_from_gradients(hidden, batch, gradients)
        if mode is Mode.LOSS:
            return self.loss(hidden, ref_hidden, batch)
        tokens = self.score(hidden, ref_hidden, batch)
        if mode is Mode.SCORE:
            return ScoredLoss(hidden.new_zeros(()), tokens)
        assert callable(gradients)
        return ScoredLoss(self.loss_from_gradients(hidden, batch, gradients(batch, tokens)).loss, tokens)

    @abstractmethod
    def score(self, hidden: Tensor, ref_hidden: Tensor | None, batch: PackedBatch) -> TokenScores:
        """The scores (M,) of all scored tokens, without gradients; arguments as in `forward`."""

    @abstractmethod
    def loss(self, hidden: Tensor, ref_hidden: Tensor | None, batch: PackedBatch) -> ScoredLoss:
        """`batch.scale` times the sum of the batch's losses, and the scores; arguments as in `forward`."""

    @abstractmethod
    def loss_from_gradients(
        self,
        hidden: Tensor,  # (M, H)
        batch: PackedBatch,
        dloss_dlogps: Tensor,  # (S,)
    ) -> ScoredLoss:
        """A loss that has the given gradients in the completions' log-probs, times `batch.scale`.

        If they are those of an objective, then by the chain rule the gradients in weights and hidden states
        are the objective's too.
        """

    def run_kernels(
        self,
        hidden: Tensor,  # (M, H)
        reference: Reference,
        targets: Tensor,  # (M,)
        groups: GroupLayout,
        loss: EdgeLoss | TokensLoss,
        scale: float,
    ) -> ScoredLoss:
        """Run the fused kernels: `scale` times the sum of the losses, and the tokens' scores."""
        inputs = hidden, self.weight, targets, groups
        transform, budget = self.transform, self.budget_bytes
        if Need.DISTRIBUTIONS in self.objective.needs:
            assert not isinstance(loss, EdgeLoss)
            wide = distribution_loss(
                *inputs,
                loss,
                reference,
                bias=self.bias,
                transform=transform,
                scale=scale,
                budget_bytes=budget,
            )
            return ScoredLoss(wide.loss, wide.tokens)
        out = preference_loss(
            *inputs,
            loss if isinstance(loss, EdgeLoss) else _without_distributions(loss),
            reference,
            bias=self.bias,
            transform=transform,
            scale=scale,
            budget_bytes=budget,
            impl=self.impl,
        )
        return ScoredLoss(out.loss, TokenScores(out.token_logps, out.ref_token_logps))


class PreferenceHead(OutputLayers):
    """Scores and losses of whole packed rows."""

    def score(self, hidden: Tensor, ref_hidden: Tensor | None, batch: PackedBatch) -> TokenScores:
        with torch.no_grad():
            return self._run(hidden, ref_hidden, batch, no_loss).tokens

    def loss(self, hidden: Tensor, ref_hidden: Tensor | None, batch: PackedBatch) -> ScoredLoss:
        return self._run(hidden, ref_hidden, batch, self._losses(batch))

    def loss_from_gradients(self, hidden: Tensor, batch: PackedBatch, dloss_dlogps: Tensor) -> ScoredLoss:
        loss = linear_loss(TokenScores(spread_over_tokens(dloss_dlogps, batch)))
        return self.run_kernels(hidden, Reference(), batch.targets, groups_of(batch), loss, batch.scale)

    def _run(
        self,
        hidden: Tensor,  # (M, H)
        ref_hidden: Tensor | None,  # (M, H)
        batch: PackedBatch,
        loss: EdgeLoss | TokensLoss,
    ) -> ScoredLoss:
        reference = Reference(token_logps=batch.ref_token_logps)
        if ref_hidden is not None:
            reference = Reference(ref_hidden, self.ref_weight, self.ref_bias)
        return self.run_kernels(hidden, reference, batch.targets, groups_of(batch), loss, batch.scale)

    def _losses(self, batch: PackedBatch) -> EdgeLoss | TokensLoss:
        """The loss as data for the kernels to form, or as a function that autograd differentiates."""
        loss = self.objective.epilogue(batch.margins)
        if loss is None:

            def sum_of_losses(tokens: TokenScores, group_range: GroupRange) -> Tensor:
                return self.objective.of_groups(batch.scored(tokens, group_range)).losses.sum()

            return sum_of_losses
        if batch.edge_weights is None:
            return loss
        assert loss.weights is None
        return replace(loss, weights=batch.edge_weights)


def groups_of(batch: PackedBatch) -> GroupLayout:
    """The layout of a batch's groups, in the kernels' type."""
    return GroupLayout(batch.lengths, batch.group_sequences, batch.group_edges, batch.chosen, batch.rejected)


def no_loss(tokens: TokenScores, group_range: GroupRange) -> Tensor:
    """A constant 0 (), for passes that only score."""
    return tokens.token_logps.new_zeros(())


def spread_over_tokens(
    dloss_dlogps: Tensor,  # (S,)
    batch: PackedBatch,
) -> Tensor:
    """(M,) gradients in the tokens' log-probs: each token gets its completion's, whose log-prob is a sum."""
    return dloss_dlogps.repeat_interleave(batch.seq_lengths, output_size=len(batch.targets))


def linear_loss(
    gradients: TokenScores,  # (M,) the gradient in each field that has one
) -> TokensLoss:
    """The linear loss that has the given gradients in the tokens' scores."""

    def loss(tokens: TokenScores, group_range: GroupRange) -> Tensor:
        pairs = zip(tokens, gradients, strict=True)
        parts = [(x * g[group_range.rows]).sum() for x, g in pairs if x is not None and g is not None]
        return torch.stack(parts).sum()

    return loss


def _without_distributions(loss: TokensLoss) -> Callable[[Tensor, Tensor | None, GroupRange], Tensor]:
    return lambda logps, ref_logps, group_range: loss(TokenScores(logps, ref_logps), group_range)
