"""Margin-Adaptive DPO: each pair's loss is weighted by the margin a reward model gives it."""

from __future__ import annotations

import math
from typing import Literal, Self

import numpy as np
import torch.nn.functional as F
from pydantic import AliasChoices, Field, model_validator
from torch import Tensor

from madpo.trainer.objectives.base import EdgeLoss, MarginWeight, Outcome, Params, objective
from madpo.trainer.objectives.fields import Beta, PositiveThreshold, number
from madpo.trainer.objectives.scores import EdgeScores


class MADPOParams(Params):
    loss_type: Literal["madpo"] = "madpo"
    beta: Beta = 0.1
    c_max: float = Field(default=4.0, gt=1, description="largest factor on a margin, for small margins")
    c_min: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="smallest factor on a margin, for large margins; null: 1 / c_max",
    )
    lam: float = Field(
        default=1.0,
        gt=0,
        validation_alias=AliasChoices("lambda", "lam"),
        serialization_alias="lambda",
        description="steepness of the change from c_max to c_min",
    )
    tau: PositiveThreshold = Field(
        default=7.0,
        description="threshold on the margin, best above nearly all of them: a pair has weight 1 at tau, and "
        "below -tau (docs/tau.md); or quantile:q of the absolute margins",
    )
    margin_scale: float = Field(default=1.0, gt=0, description="factor on the margins of the data set")
    ablation: Literal["amplify", "regularise"] | None = Field(
        default=None, description="amplify: no factor below 1; regularise: none above 1; null: both"
    )

    @model_validator(mode="after")
    def _resolve_c_min(self) -> Self:
        if self.c_min is None:
            object.__setattr__(self, "c_min", 1.0 / self.c_max)
        return self

    def scale_of(self, values: np.ndarray) -> np.ndarray:
        return np.abs(values * self.margin_scale)

    @property
    def weight(self) -> MarginWeight:
        """A pair's weight as a function of its margin; `MarginWeight` has the equation."""
        assert self.c_min is not None
        return MarginWeight(
            self.c_max,
            self.c_min,
            self.lam,
            number(self.tau),
            self.margin_scale,
            lowest=1.0 if self.ablation == "amplify" else 0.0,
            highest=1.0 if self.ablation == "regularise" else math.inf,
        )


def epilogue(margins: Tensor, params: MADPOParams) -> EdgeLoss:
    return EdgeLoss(beta=params.beta, margins=margins, margin_weight=params.weight)


def weight_of(margins: Tensor, params: MADPOParams) -> Tensor:
    return params.weight(margins)


@objective(MADPOParams, {"reference", "margins"}, epilogue=epilogue, weight=weight_of)
def madpo(scores: EdgeScores, params: MADPOParams) -> Outcome:
    """L = w(h) (-log sigmoid(beta D)), a mean over pairs that is not divided by the sum of w.

    h is the data set's margin, a constant. The ablations clamp c at 1 from below (amplify) or above
    (regularise); the paper shows such curves, their form here is assumed.
    Source: Rho 2025 (arXiv 2510.05342).
    """
    assert scores.margins is not None
    weight = weight_of(scores.margins.double(), params)
    losses = -F.logsigmoid(params.beta * scores.deltas) * weight.to(scores.deltas.dtype)
    return Outcome(losses, {"madpo/weight": weight})
