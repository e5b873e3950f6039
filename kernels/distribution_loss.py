"""The preference head for objectives that need whole distributions, not the targets' log-probs alone.

Plain torch on any device, in chunks of whole groups. Autograd differentiates a chunk's logits, so it keeps
several times the logits of `preference_loss` and reads them more often. For the few objectives that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from madpo.kernels.checks import require_head
from madpo.kernels.chunks import Chunk, plan_chunks
from madpo.kernels.gemm import wide_dtype
from madpo.kernels.layout import GroupLayout, GroupRange
from madpo.kernels.preference_loss import PreferenceLossFunction, Reference
from madpo.kernels.primitives import TORCH
from madpo.kernels.token_scores import TokenScores
from madpo.kernels.transform import IDENTITY, LogitTransform

COPIES = 8
"""Tensors of the logits' size alive at once, at most: both models', before and after softmax, gradients."""


TokensLoss = Callable[[TokenScores, GroupRange], Tensor]
"""(differentiable scores of m tokens, their groups) -> () the sum of these groups' losses."""


class DistributionLoss(NamedTuple):
    """Only `loss` carries a gradient."""

    loss: Tensor  # () scale * sum of the losses
    tokens: TokenScores  # (M,)


def distribution_loss(
    hidden: Tensor,  # (M, H) the positions that predict the targets
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (M,) in [0, V)
    groups: GroupLayout,
    loss: TokensLoss,
    reference: Reference | None = None,
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = IDENTITY,
    scale: float = 1.0,
    budget_bytes: int = 2**31,
) -> DistributionLoss:
    """scale * sum of the losses, with gradients to `hidden`, `weight` and `bias`, formed in forward.

    Chunks of whole groups take about `budget_bytes`; a larger group is a chunk of its own. The reference is
    given by its hidden states and weight, or by the log-probs of the targets, which give no KL.

    Rows and weight are as in `preference_loss`. Raises ValueError for shapes that contradict each other, for
    a target outside [0, V) (on a GPU an assertion on the device fails) and for a sharded weight.
    """
    require_head(hidden, weight, bias, targets)
    groups.check(len(targets))
    reference, budget_bytes = reference or Reference(), budget_bytes // COPIES
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    forward = partial(_forward, needs, targets, groups, loss, reference, transform, scale, budget_bytes)
    out = PreferenceLossFunction.apply(hidden, weight, bias, forward, TORCH)
    return DistributionLoss(out[0], TokenScores(*out[1:]))  # type: ignore[index]


def _forward(
    needs: Sequence[bool],
    targets: Tensor,
    groups: GroupLayout,
    loss: TokensLoss,
    reference: Reference,
    transform: LogitTransform,
    scale: float,
    budget_bytes: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], Sequence[Tensor | None]]:
    wide = wide_dtype(hidden)

    def leaf(x: Tensor, need: bool) -> Tensor:
        return x.detach().to(wide, copy=True).requires_grad_(need)

    wide_weight = leaf(weight, needs[1])
    wide_bias = None if bias is None else leaf(bias, needs[2])
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    d_hidden = torch.zeros_like(hidden) if needs[0] else None
    scores: list[TokenScores] = []
    chunks = plan_chunks(groups, len(weight), budget_bytes, wide, wide)
    for chunk in chunks or [Chunk(groups.whole_range, wide, len(weight))]:  # no tokens: one empty chunk
        rows = chunk.group_range.rows
        wide_hidden = leaf(hidden[rows], needs[0])
        with torch.enable_grad():
            inputs = wide_hidden, wide_weight, wide_bias, targets[rows]
            tokens = _token_scores(*inputs, reference, rows, transform)
            chunk_loss = scale * loss(tokens, chunk.group_range)
        if chunk_loss.requires_grad:
            chunk_loss.backward()
        if d_hidden is not None and wide_hidden.grad is not None:
            d_hidden[rows] = wide_hidden.grad.to(hidden.dtype)
        total += chunk_loss.detach()
        scores.append(tokens.detach())
    joined = (None if x[0] is None else torch.cat(x) for x in zip(*scores, strict=True))
    gradients = [d_hidden, _gradient(wide_weight, weight), _gradient(wide_bias, bias)]
    return (total.to(wide), *joined), gradients


def _gradient(leaf: Tensor | None, like: Tensor | None) -> Tensor | None:
    if leaf is None or like is None or not leaf.requires_grad:
        return None
    return torch.zeros_like(like) if leaf.grad is None else leaf.grad.to(like.dtype)


def _token_scores(
    hidden: Tensor,  # (m, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (m,)
    reference: Reference,
    rows: slice,
    transform: LogitTransform,
) -> TokenScores:
    logps = _log_softmax(hidden, weight, bias, transform)
    collisions = torch.logsumexp(2 * logps.detach(), 1)
    ref_token_logps, kl = reference.token_logps, None
    if ref_token_logps is not None:
        ref_token_logps = ref_token_logps[rows].to(logps)
    if reference.hidden is not None and reference.weight is not None:
        with torch.no_grad():
            ref_hidden, ref_weight = reference.hidden[rows].to(hidden), reference.weight.to(hidden)
            ref_logps = _log_softmax(ref_hidden, ref_weight, reference.bias, transform)
            ref_token_logps = _at(ref_logps, targets)
        kl = (ref_logps.exp() * (ref_logps - logps)).sum(1)
    return TokenScores(_at(logps, targets), ref_token_logps, collisions, kl)


def _log_softmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """(m, V)"""
    logits = hidden @ weight.T
    return transform(logits if bias is None else logits + bias.to(logits.dtype)).log_softmax(1)


def _at(logps: Tensor, targets: Tensor) -> Tensor:
    return logps.gather(1, targets[:, None])[:, 0]
