"""The primitives in plain torch: for CPUs, for float64, and as twins to test the kernels against."""

from __future__ import annotations

import torch
from torch import Tensor

from madpo.kernels.edge_loss import EdgeLoss, edge_loss_ref
from madpo.kernels.layout import GroupLayout, GroupRange
from madpo.kernels.stats import LogitStats, PairLosses
from madpo.kernels.transform import LogitTransform


def row_stats_ref(
    logits: Tensor,  # (m, C)
    targets: Tensor,  # (m,)
    logps: Tensor,  # (m,)
    normalisers: Tensor | None = None,  # (m,)
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform,
    hits: Tensor | None = None,  # (m,)
    entropies: Tensor | None = None,  # (m,)
    state: Tensor | None = None,  # (3, m)
    first_column: int = 0,
    last: bool = True,
) -> None:
    """`logit_rows.row_stats` in plain torch."""
    z = _transformed(logits, bias, transform, first_column, logps.dtype)
    maximum, total = z.amax(1), torch.zeros_like(logps)
    target_logit = torch.full_like(logps, torch.nan)
    if first_column and state is not None:
        maximum, target_logit = torch.maximum(maximum, state[0]), state[2]
        total = state[1] * (state[0] - maximum).exp()
    e = (z - maximum[:, None]).exp_()
    total = total + e.sum(1)
    columns = targets[:, None] - first_column
    inside = (columns >= 0) & (columns < z.shape[1])
    gathered = z.gather(1, columns.clamp(0, z.shape[1] - 1))
    target_logit = torch.where(inside, gathered, target_logit[:, None])[:, 0]
    if not last:
        assert state is not None
        state.copy_(torch.stack((maximum, total, target_logit)))
        return
    torch.sub(target_logit - maximum, total.log(), out=logps)
    if normalisers is not None:
        torch.add(maximum, total.log(), out=normalisers)
    if hits is not None:
        torch.ge(target_logit, maximum, out=hits)
    if entropies is not None:
        moment = (e * (z - maximum[:, None])).nan_to_num_(nan=0.0).sum(1)
        torch.sub(total.log(), moment / total, out=entropies)


def dlogits_ref_(
    logits: Tensor,  # (m, C)
    targets: Tensor,  # (m,)
    normalisers: Tensor,  # (m,)
    dloss_dlogps: Tensor,  # (m,)
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform,
    dtype: torch.dtype,
    out: Tensor | None = None,  # (m, C)
    first_column: int = 0,
) -> Tensor:
    """`logit_rows.dlogits_` in plain torch; it may wait for the device."""
    z = _transformed(logits, bias, transform, first_column, normalisers.dtype)
    derivative = transform.derivative(z)
    d = z.clone() if z is logits and out is not None and out is not logits else z
    d.sub_(normalisers[:, None]).exp_().mul_(-dloss_dlogps[:, None])
    columns = targets[:, None] - first_column
    inside = (columns >= 0) & (columns < d.shape[1])
    d.scatter_add_(1, columns.clamp(0, d.shape[1] - 1), torch.where(inside, dloss_dlogps[:, None], 0))
    if not isinstance(derivative, float) or derivative != 1.0:
        d.mul_(derivative)
    d.masked_fill_((dloss_dlogps == 0)[:, None], 0.0)
    return d.to(dtype) if out is None else out.copy_(d)


def _transformed(
    logits: Tensor, bias: Tensor | None, transform: LogitTransform, first: int, dtype: torch.dtype
) -> Tensor:
    x = logits.to(dtype)
    return transform(x if bias is None else x + bias[first : first + x.shape[1]])


def sequence_sums_ref(values: Tensor, groups: GroupLayout, group_range: GroupRange, sums: Tensor) -> None:
    """`group_loss.sequence_sums` in plain torch."""
    lengths = groups.ranges.rows.diff()[group_range.sequences]
    # unsafe=True skips a check of the lengths that would wait for the device.
    sums[group_range.sequences] = torch.segment_reduce(
        values[group_range.rows].double(), "sum", lengths=lengths, initial=0.0, unsafe=True
    )


def group_losses_ref(
    pairs: PairLosses,
    groups: GroupLayout,
    group_range: GroupRange,
    loss: EdgeLoss,
    scale: float,
) -> None:
    """`group_loss.group_losses` in plain torch, with gradients by autograd."""
    sequences, edges, first = group_range.sequences, group_range.edges, group_range.sequences.start
    lengths = groups.ranges.rows.diff()[sequences]
    with torch.enable_grad():
        leaf = pairs.logps[sequences].clone().requires_grad_()
        losses = edge_loss_ref(
            leaf,
            None if pairs.ref_logps is None else pairs.ref_logps[sequences],
            lengths,
            groups.chosen[edges] - first,
            groups.rejected[edges] - first,
            loss,
            edges,
        )
        (gradient,) = torch.autograd.grad(scale * losses.sum(), leaf)
    pairs.losses[edges] = losses.detach().to(pairs.losses.dtype)
    gradients = gradient.repeat_interleave(lengths, output_size=group_range.num_rows)
    pairs.dloss_dlogps[group_range.rows] = gradients.to(pairs.dloss_dlogps.dtype)


def score_groups_ref(
    logits: Tensor,  # (M, V)
    ref_logits: Tensor | None,  # (M, V)
    targets: Tensor,  # (M,)
    groups: GroupLayout,
    loss: EdgeLoss,
    scale: float,
    transform: LogitTransform,
    stats: LogitStats,
    pairs: PairLosses,
) -> None:
    """`fused_from_logits.score_groups` in plain torch: the other primitives one after another."""
    whole = groups.whole_range
    row_stats_ref(logits, targets, stats.token_logps, stats.normalisers, transform=transform)
    sequence_sums_ref(stats.token_logps, groups, whole, pairs.logps)
    if stats.ref_token_logps is not None:
        if ref_logits is not None:
            row_stats_ref(ref_logits, targets, stats.ref_token_logps, transform=transform)
        assert pairs.ref_logps is not None
        sequence_sums_ref(stats.ref_token_logps, groups, whole, pairs.ref_logps)
    group_losses_ref(pairs, groups, whole, loss, scale)


def scale_ref_(x: Tensor, factor: Tensor) -> Tensor:
    """`logit_rows.scale_` in plain torch."""
    return x.mul_(factor.to(x.dtype))
