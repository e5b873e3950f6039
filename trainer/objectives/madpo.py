"""Margin-Adaptive DPO: each pair's loss is weighted by the margin a reward model gives it."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from madpo.trainer.objectives.base import Objective, Outcome, Params, Scored


class MADPOParams(Params):
    loss_type: Literal["madpo"] = "madpo"
    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference")
    c_max: float = Field(default=4.0, gt=1, description="amplification limit, above 1")
    c_min: float | None = Field(default=None, gt=0, lt=1, description="dampening limit; null is 1 / c_max")
    steepness: float = Field(default=1.0, gt=0, alias="lambda", description="steepness of the transition")
    tau: float = Field(default=7.0, gt=0, description="margin at which the weight crosses 1")
    margin_scale: float = Field(default=1.0, gt=0, description="multiplies the margins of the data set")

    @model_validator(mode="after")
    def _resolve_c_min(self) -> Self:
        if self.c_min is None:
            object.__setattr__(self, "c_min", 1.0 / self.c_max)
        return self


def madpo_weight(
    margins: Tensor,  # (E,) reward of the winner minus reward of the loser
    c_max: float,
    c_min: float,
    steepness: float,
    tau: float,
) -> Tensor:  # (E,)
    """The weight of a pair as a function of its reward margin h.

        c(m) = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * exp(steepness * (m - tau)))
        w(h) = sigmoid(c(|h|) h) / sigmoid(h)   where h > -tau,   1 elsewhere

    Formed in log space: the ratio of two sigmoids underflows to 0 / 0 below h = -103 in float32, and
    a mask that multiplies would turn that into NaN.

    Source: Rho 2025 (arXiv 2510.05342) and the author's `MADPOLoss`.
    """
    c = c_min + (c_max - c_min) * torch.sigmoid(
        -(steepness * (margins.abs() - tau) + math.log((c_max - 1) / (1 - c_min)))
    )
    weight = torch.exp(F.logsigmoid(c * margins) - F.logsigmoid(margins))
    return torch.where(margins > -tau, weight, torch.ones_like(weight))


def madpo(scored: Scored, params: MADPOParams) -> Outcome:
    """L = w(h) * (-log sigmoid(beta * D)), a mean over pairs that is not divided by the sum of w.

    h is the data set's margin, a constant; D is DPO's log-ratio difference.
    Source: Rho 2025 (arXiv 2510.05342). Returns one loss per edge, (E,).
    """
    assert params.c_min is not None
    weight = madpo_weight(
        scored.margins.double() * params.margin_scale,
        params.c_max,
        params.c_min,
        params.steepness,
        params.tau,
    )
    return Outcome(-F.logsigmoid(params.beta * scored.deltas) * weight, {"madpo/weight": weight})


OBJECTIVE = Objective(madpo, MADPOParams, needs_margin=True)
