"""The family of pairwise losses that the kernels form themselves: its parameters, and its plain torch twin.

With l the log-prob of a completion (divided by its length where `length_normalised`), r the
reference's (0 without one), w chosen and l rejected, D = (l_w - r_w) - (l_l - r_l) and
z = beta * D - offset,

    sigmoid   positive * softplus(-z) + negative * softplus(z)
    hinge     max(0, 1 - z)
    ipo       ((z - 1/2) / beta)^2

times the edge's weight. DPO is (1, 0), label smoothing e is (1 - e, e), robust DPO is
((1 - e) / (1 - 2e), -e / (1 - 2e)). docs/kernels.md has the derivation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MarginWeight:
    """MADPO's weight of an edge as a function of its margin h.

    c(m) = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * exp(lam * (m - tau)))
    w(h) = sigmoid(c(|h|) h) / sigmoid(h)   where h > -tau,   1 elsewhere

    Source: Rho 2025 (arXiv 2510.05342) and the author's `MADPOLoss`.
    """

    c_max: float
    c_min: float
    lam: float
    tau: float
    margin_scale: float = 1.0  # multiplies the margins first
    lowest: float = 0.0  # c is clamped to [lowest, highest]
    highest: float = math.inf

    @property
    def log_odds(self) -> float:
        """log((c_max - 1) / (1 - c_min)), which makes c(tau) = 1."""
        return math.log((self.c_max - 1) / (1 - self.c_min))

    def __call__(self, margins: Tensor) -> Tensor:
        """margins (E,) -> weights (E,); in log space, where the ratio cannot become 0 / 0."""
        h = margins * self.margin_scale
        gate = torch.sigmoid(-(self.lam * (h.abs() - self.tau) + self.log_odds))
        c = (self.c_min + (self.c_max - self.c_min) * gate).clamp(self.lowest, self.highest)
        weights = torch.exp(F.logsigmoid(c * h) - F.logsigmoid(h))
        return torch.where(h <= -self.tau, torch.ones_like(weights), weights)  # NaN stays NaN


@dataclass(frozen=True)
class EdgeLoss:
    """One member of the family. Its vectors are on the device of the hidden states or logits."""

    beta: float
    curve: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    positive: float = 1.0  # sigmoid curve: weight of the preference as given
    negative: float = 0.0  # sigmoid curve: weight of the reversed preference
    length_normalised: bool = False
    offset: float = 0.0
    offsets: Tensor | None = None  # (E,) added to `offset`
    weights: Tensor | None = None  # (E,)
    margins: Tensor | None = None  # (E,) for `margin_weight`
    margin_weight: MarginWeight | None = None

    def __post_init__(self) -> None:
        if self.curve not in ("sigmoid", "hinge", "ipo"):
            raise ValueError(f"curve: {self.curve!r} is not one of sigmoid, hinge, ipo")
        if not self.beta > 0:
            raise ValueError(f"beta: {self.beta} is not allowed; it must be above 0")
        if (self.margins is None) != (self.margin_weight is None):
            raise ValueError("margins and margin_weight come together: give both or neither")


def edge_loss_ref(
    logps: Tensor,  # (S,) summed over each sequence
    ref_logps: Tensor | None,  # (S,)
    lengths: Tensor,  # (S,)
    chosen: Tensor,  # (E,)
    rejected: Tensor,  # (E,)
    loss: EdgeLoss,
    edges: slice = slice(None),  # the part of the loss's vectors that `chosen` and `rejected` are for
) -> Tensor:
    """The weighted losses (E,), differentiable in `logps`, in its dtype."""
    ratios = logps if ref_logps is None else logps - ref_logps
    if loss.length_normalised:
        ratios = ratios / lengths.clamp(min=1)
    z = loss.beta * (ratios[chosen] - ratios[rejected]) - loss.offset
    if loss.offsets is not None:
        z = z - loss.offsets[edges]
    if loss.curve == "sigmoid":
        losses = loss.positive * -F.logsigmoid(z) + loss.negative * -F.logsigmoid(-z)
    elif loss.curve == "hinge":
        losses = torch.relu(1 - z)
    else:
        losses = ((z - 0.5) / loss.beta).square()
    if loss.weights is not None:
        losses = losses * loss.weights[edges]
    if loss.margins is not None and loss.margin_weight is not None:
        losses = losses * loss.margin_weight(loss.margins[edges].double()).to(losses.dtype)
    return losses
