"""The ops in plain torch, with all logits in memory and gradients by autograd: what the tests compare with.

In float64 they are exact to rounding; in a narrow dtype they show what torch itself loses.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from madpo.kernels.edge_loss import EdgeLoss, edge_loss_ref
from madpo.kernels.layout import GroupLayout
from madpo.kernels.preference_loss import LogpsLoss, Reference
from madpo.kernels.transform import IDENTITY, LogitTransform


def token_logps_ref(
    logits: Tensor,  # (M, V)
    targets: Tensor,  # (M,)
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """(M,) log softmax(logits)[target], in float32 at the least."""
    logits = transform(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def linear_token_logps_ref(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (M,)
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = IDENTITY,
) -> Tensor:
    """(M,) log softmax(hidden W^T + bias)[target]."""
    return token_logps_ref(torch.nn.functional.linear(hidden, weight, bias), targets, transform)


def preference_loss_from_logps_ref(
    token_logps: Tensor,  # (M,)
    ref_token_logps: Tensor | None,  # (M,)
    groups: GroupLayout,
    loss: EdgeLoss | LogpsLoss,
    ref_logps: Tensor | None = None,  # (S,)
) -> Tensor:
    """() the sum of the losses."""
    if not isinstance(loss, EdgeLoss):
        return loss(token_logps, ref_token_logps, groups.whole_range)
    if ref_token_logps is not None:
        ref_logps = _sums(ref_token_logps, groups)
    lengths = torch.tensor(groups.lengths, device=token_logps.device)
    sums = _sums(token_logps, groups)
    return edge_loss_ref(sums, ref_logps, lengths, groups.chosen, groups.rejected, loss).sum()


def preference_loss_ref(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (M,)
    groups: GroupLayout,
    loss: EdgeLoss | LogpsLoss,
    reference: Reference | None = None,
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = IDENTITY,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss (), token_logps (M,), ref_token_logps (M,) or None)."""
    reference = reference or Reference()
    logps, ref_logps = linear_token_logps_ref(hidden, weight, targets, bias, transform), reference.token_logps
    if reference.hidden is not None and reference.weight is not None:
        ref_logps = linear_token_logps_ref(
            reference.hidden, reference.weight, targets, reference.bias, transform
        )
    total = preference_loss_from_logps_ref(logps, ref_logps, groups, loss, reference.logps)
    return scale * total, logps, ref_logps


def _sums(values: Tensor, groups: GroupLayout) -> Tensor:
    """(M,) -> (S,)"""
    return torch.stack([values[a:b].sum() for a, b in pairwise([0, *accumulate(groups.lengths)])])
