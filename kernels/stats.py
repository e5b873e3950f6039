"""The vectors that the primitives fill on the way from logits to gradients, allocated by their callers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitStats(NamedTuple):
    """One number per row of logits, in float32 (float64 for float64 logits)."""

    token_logps: Tensor  # (M,) the policy's log-prob of the target
    ref_token_logps: Tensor | None  # (M,) the reference's
    normalisers: Tensor  # (M,) logsumexp of the policy's logits


class PairLosses(NamedTuple):
    """Sums over sequences, losses of edges, and the gradient of the loss."""

    logps: Tensor  # (S,) float64, the policy's log-prob of each sequence
    ref_logps: Tensor | None  # (S,) the reference's
    losses: Tensor  # (E,) weighted, without the scale
    dloss_dlogps: Tensor  # (M,) d(scale * sum of the losses) / d(log-prob of the target)
