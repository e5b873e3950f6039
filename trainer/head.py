"""The loss head: the only caller of kernels/. Hidden states in, loss and log-probs out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from madpo.kernels.distribution_loss import RowStatistics, distribution_loss
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import Groups, Span
from madpo.kernels.preference_loss import Reference, SpanLoss, preference_loss
from madpo.kernels.steps import Impl
from madpo.kernels.transform import IDENTITY, LogitTransform
from madpo.trainer.data.packing import PackedBatch
from madpo.trainer.objectives.base import Objective, Params, Scored, segment_sum

__all__ = ["Impl", "LogitTransform", "OutputHead", "PreferenceHead", "scored_span"]


@dataclass(frozen=True)
class OutputHead:
    """How a model turns hidden states into logits."""

    weight: nn.Parameter  # (V, H)
    bias: nn.Parameter | None = None  # (V,)
    transform: LogitTransform = IDENTITY


class PreferenceHead(nn.Module):
    """Holds the output embeddings of policy and reference, shared with the models that own them.

    A module of its own so that ZeRO-3 gathers the two weights around its forward and backward only.
    """

    def __init__(
        self,
        policy: OutputHead,
        reference: OutputHead | None,
        objective: Objective,
        params: Params,
        budget_bytes: int,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        assert reference is None or reference.transform == policy.transform
        self.weight, self.bias, self.transform = policy.weight, policy.bias, policy.transform
        self.ref_weight = reference.weight if reference else None
        self.ref_bias = reference.bias if reference else None
        self.objective = objective
        self.params = params
        self.budget_bytes = budget_bytes
        self.impl: Impl = impl

    def forward(
        self,
        hidden: Tensor,  # (M, H) policy, scored rows
        ref_hidden: Tensor | None,  # (M, H)
        batch: PackedBatch,
    ) -> tuple[Tensor | None, ...]:
        """The loss (), and of each row (M,) what `scored_span` takes: token_logps, ref_token_logps, ..."""
        inputs = hidden, self.weight, batch.targets
        groups = Groups(batch.lengths, batch.group_sequences, batch.group_edges, batch.winners, batch.losers)
        reference = Reference(token_logps=batch.ref_token_logps)
        if ref_hidden is not None:
            reference = Reference(ref_hidden, self.ref_weight, self.ref_bias)
        options: Any = {
            "bias": self.bias,
            "transform": self.transform,
            "scale": batch.scale,
            "budget_bytes": self.budget_bytes,
        }
        if "distributions" in self.objective.needs:
            loss = partial(self._rows_loss, batch)
            out = distribution_loss(*inputs, groups, loss, reference, **options)
            return out.loss, *out.rows
        out = preference_loss(*inputs, groups, self._loss(batch), reference, impl=self.impl, **options)
        return out.loss, out.token_logps, out.ref_token_logps

    def _loss(self, batch: PackedBatch) -> EdgeLoss | SpanLoss:
        """What the kernels form or differentiate; nothing where the losses wait for the whole batch."""
        if batch.slopes is not None:
            return partial(_linear_loss, batch)
        if self.objective.needs_batch:
            return lambda logps, ref_logps, span: logps.new_zeros(())
        if self.objective.epilogue is not None:
            loss = self.objective.epilogue(batch.margins, self.params)
            if batch.edge_weights is None:
                return loss
            return replace(loss, weights=batch.edge_weights, margins=None, margin_weight=None)
        return partial(self._span_loss, batch)

    def _rows_loss(self, batch: PackedBatch, rows: RowStatistics, span: Span) -> Tensor:
        return self.objective(scored_span(batch, *rows, span=span), self.params).losses.sum()

    def _span_loss(self, batch: PackedBatch, logps: Tensor, ref_logps: Tensor | None, span: Span) -> Tensor:
        return self.objective(scored_span(batch, logps, ref_logps, span=span), self.params).losses.sum()


def _linear_loss(batch: PackedBatch, logps: Tensor, ref_logps: Tensor | None, span: Span) -> Tensor:
    """A stand-in that has the gradient of the losses whose slopes are known."""
    assert batch.slopes is not None
    sums = segment_sum(logps, batch.seq_lengths[span.sequences])
    return (sums * batch.slopes[span.sequences]).sum()


WHOLE = Span(*(slice(0, None),) * 4)


def scored_span(
    batch: PackedBatch,
    token_logps: Tensor,  # (m,) of the span's rows
    ref_token_logps: Tensor | None = None,  # (m,)
    log_collisions: Tensor | None = None,  # (m,)
    kl: Tensor | None = None,  # (m,)
    *,
    span: Span = WHOLE,
) -> Scored:
    """What the objective sees of some whole groups, or of the whole batch; sequences count from the first."""
    first = span.sequences.start
    return Scored(
        token_logps,
        ref_token_logps,
        batch.seq_lengths[span.sequences],
        batch.winners[span.edges] - first,
        batch.losers[span.edges] - first,
        batch.margins[span.edges],
        batch.labels[span.sequences],
        log_collisions,
        kl,
        None if batch.edge_weights is None else batch.edge_weights[span.edges],
    )
