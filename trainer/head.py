"""The loss head: the only caller of kernels/. Hidden states in, loss and log-probs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from madpo.kernels.distribution_loss import distribution_loss
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import Groups, Span
from madpo.kernels.preference_loss import Reference, SpanLoss, preference_loss
from madpo.kernels.steps import Impl
from madpo.kernels.transform import IDENTITY, LogitTransform
from madpo.trainer.data.packing import PackedBatch
from madpo.trainer.objectives.base import Objective, Params, Scored
from madpo.trainer.sequence_parallel import SequenceGroup

__all__ = ["FindSlopes", "Impl", "LogitTransform", "OutputHead", "PreferenceHead", "scored_span"]


FindSlopes = Callable[[PackedBatch, Sequence[Tensor | None]], Tensor]
"""(a batch, what is known of its rows (M,)) -> the slopes (S,) of the step's losses in its log-probs."""


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
        sequence_group: SequenceGroup | None = None,
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
        self.sequence_group = sequence_group

    def forward(
        self,
        hidden: Tensor,  # (M, H) policy, scored rows
        ref_hidden: Tensor | None,  # (M, H)
        batch: PackedBatch,
        find_slopes: FindSlopes | None = None,
    ) -> tuple[Tensor | None, ...]:
        """The loss (), and of each row (M,) what `scored_span` takes: token_logps, ref_token_logps, ...

        Of a batch in slices the hidden states are those of its own rows, (m, H). With `find_slopes` a first
        pass over the rows finds what they are worth, and the loss is that of a batch with these slopes.
        """
        if batch.own_rows is not None:
            return self._in_slices(hidden, ref_hidden, batch, batch.own_rows, find_slopes)
        groups = Groups(batch.lengths, batch.group_sequences, batch.group_edges, batch.winners, batch.losers)
        score: Any = partial(self._score, hidden, targets=batch.targets, groups=groups, scale=batch.scale)
        reference = self._reference(ref_hidden, batch.ref_token_logps)
        if find_slopes is None:
            return score(reference, loss=self._loss(batch))
        with torch.no_grad():
            _, *rows = score(reference, loss=_no_loss)
        loss, *_ = score(Reference(), loss=self._loss(replace(batch, slopes=find_slopes(batch, rows))))
        return loss, *rows

    def _reference(
        self,
        hidden: Tensor | None,  # (M, H)
        token_logps: Tensor | None = None,  # (M,) if they are known
    ) -> Reference:
        if hidden is None:
            return Reference(token_logps=token_logps)
        return Reference(hidden, self.ref_weight, self.ref_bias)

    def _score(
        self,
        hidden: Tensor,  # (M, H)
        reference: Reference,
        targets: Tensor,  # (M,)
        groups: Groups,
        loss: EdgeLoss | Callable[..., Tensor],  # (what is known of the rows, one by one, and the span)
        scale: float,
    ) -> tuple[Tensor | None, ...]:
        """As `forward`, for the loss of the groups' spans."""
        inputs = hidden, self.weight, targets, groups
        options: Any = {
            "bias": self.bias,
            "transform": self.transform,
            "scale": scale,
            "budget_bytes": self.budget_bytes,
        }
        if "distributions" in self.objective.needs:
            assert not isinstance(loss, EdgeLoss)
            out = distribution_loss(*inputs, lambda rows, span: loss(*rows, span), reference, **options)
            return out.loss, *out.rows
        out = preference_loss(*inputs, loss, reference, impl=self.impl, **options)
        return out.loss, out.token_logps, out.ref_token_logps

    def _in_slices(
        self,
        hidden: Tensor,  # (m, H)
        ref_hidden: Tensor | None,  # (m, H)
        batch: PackedBatch,
        own_rows: Tensor,  # (m,)
        find_slopes: FindSlopes | None,
    ) -> tuple[Tensor | None, ...]:
        """As `forward`, by two passes over this rank's rows, whose slopes depend on those of other slices:
        the log-probs of all slices meet and give the slopes, with which the second pass has the gradient of
        the losses, by the chain rule. The sum over the group's ranks is the gradient of the whole row. The
        loss itself is that of the stand-in, or 0 without gradients.
        """
        assert self.sequence_group is not None
        targets = batch.targets[own_rows]
        score: Any = partial(self._score, hidden, targets=targets, groups=_blocks(targets), scale=batch.scale)
        if batch.slopes is not None:
            return score(Reference(), loss=partial(_linear_loss, [_row_slopes(batch)[own_rows]]))
        reference = self._reference(ref_hidden)
        with torch.no_grad():
            loss, *rows = score(reference, loss=_no_loss)
        whole = self.sequence_group.meet(rows, own_rows, len(batch.targets))
        if batch.ref_token_logps is not None:
            whole[1] = batch.ref_token_logps
        if find_slopes is not None:
            batch = replace(batch, slopes=find_slopes(batch, whole))
            loss, *_ = score(Reference(), loss=partial(_linear_loss, [_row_slopes(batch)[own_rows]]))
        elif torch.is_grad_enabled() and not self.objective.needs_batch:
            slopes = [slope[own_rows] for slope in self._slopes(batch, whole)]
            again = reference if "distributions" in self.objective.needs else Reference()
            loss, *_ = score(again, loss=partial(_linear_loss, slopes))
        return loss, *whole

    def _slopes(self, batch: PackedBatch, rows: Sequence[Tensor | None]) -> list[Tensor]:
        """Of the sum of the losses in what is known of each row; (M,) each."""
        leaves = [row if row is None else row.clone().requires_grad_() for row in rows]
        losses = self.objective(scored_span(batch, *leaves), self.params).losses.sum()  # type: ignore[arg-type]
        known = [leaf for leaf in leaves if leaf is not None]
        return list(torch.autograd.grad(losses, known, allow_unused=True, materialize_grads=True))

    def _loss(self, batch: PackedBatch) -> EdgeLoss | SpanLoss:
        """What the kernels form or differentiate; nothing where the losses wait for the whole batch."""
        if batch.slopes is not None:
            return partial(_linear_loss, [_row_slopes(batch)])
        if self.objective.needs_batch:
            return _no_loss
        if self.objective.epilogue is not None:
            loss = self.objective.epilogue(batch.margins, self.params)
            if batch.edge_weights is None:
                return loss
            return replace(loss, weights=batch.edge_weights, margins=None, margin_weight=None)
        return partial(self._span_loss, batch)

    def _span_loss(self, batch: PackedBatch, *rows_and_span: Any) -> Tensor:
        *rows, span = rows_and_span
        return self.objective(scored_span(batch, *rows, span=span), self.params).losses.sum()


def _no_loss(logps: Tensor, *rest: Any) -> Tensor:
    return logps.new_zeros(())


def _row_slopes(batch: PackedBatch) -> Tensor:
    """(M,) every row has the slope of its sequence."""
    assert batch.slopes is not None
    return batch.slopes.repeat_interleave(batch.seq_lengths, output_size=len(batch.targets))


def _linear_loss(slopes: Sequence[Tensor], *rows_and_span: Any) -> Tensor:
    """A stand-in that has the gradient of the losses whose slopes are known, (M,) for each value."""
    *rows, span = rows_and_span
    known = [row for row in rows if row is not None]
    return torch.stack([(x * s[span.rows]).sum() for x, s in zip(known, slopes, strict=False)]).sum()


BLOCK = 256


def _blocks(targets: Tensor) -> Groups:
    """Rows that are compared with nothing, in blocks, between which a wave of logits may end."""
    full, rest = divmod(len(targets), BLOCK)
    return Groups.alone([BLOCK] * full + [rest] * bool(rest), targets.device)


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
