"""Margin-Adaptive DPO: each pair's loss is weighted by the margin a reward model gives it."""

from __future__ import annotations

from typing import Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from madpo.trainer.objectives.base import EdgeLoss, MarginWeight, Objective, Outcome, Params, Scored


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

    @property
    def weight(self) -> MarginWeight:
        """The weight of a pair as a function of its margin, with the equation."""
        assert self.c_min is not None
        return MarginWeight(self.c_max, self.c_min, self.steepness, self.tau, self.margin_scale)


def madpo(scored: Scored, params: MADPOParams) -> Outcome:
    """L = w(h) * (-log sigmoid(beta * D)), a mean over pairs that is not divided by the sum of w.

    h is the data set's margin, a constant; D is DPO's log-ratio difference.
    Source: Rho 2025 (arXiv 2510.05342). Returns one loss per edge, (E,).
    """
    weight = params.weight(scored.margins.double())
    return Outcome(-F.logsigmoid(params.beta * scored.deltas) * weight, {"madpo/weight": weight})


def epilogue(margins: Tensor, params: MADPOParams) -> EdgeLoss:
    return EdgeLoss(beta=params.beta, margins=margins, margin_weight=params.weight)


OBJECTIVE = Objective(madpo, MADPOParams, needs_margin=True, epilogue=epilogue)
