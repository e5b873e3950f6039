"""DPO with an offset inside the sigmoid, from margins or lengths; a damped rejected part; ties."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import EdgeLoss, Outcome, Params, objective
from madpo.trainer.objectives.fields import Beta, Lambda
from madpo.trainer.objectives.scores import EdgeScores


class ODPOParams(Params):
    loss_type: Literal["odpo"] = "odpo"
    beta: Beta = 0.1
    alpha: Annotated[float, Field(ge=0, description="factor on the offset, log(margin)")] = 1.0

    def problem_with(self, margins: np.ndarray) -> str | None:
        count = int((margins <= 0).sum())
        if not count:
            return None
        return (
            f"{count} of {len(margins)} margins are 0 or less, of which odpo takes the logarithm; leave "
            "those pairs out, or use loss_type mmpo or madpo"
        )


@objective(
    ODPOParams,
    {"reference", "margins"},
    epilogue=lambda margins, p: EdgeLoss(p.beta, offsets=p.alpha * torch.log(margins)),
)
def odpo(scores: EdgeScores, params: ODPOParams) -> Tensor:
    """L = -log sigmoid(beta D - alpha log h), h > 0 the score of the chosen minus that of the rejected.

    A margin of 0 or less gives an infinite or undefined loss: leave such pairs out.
    Source: Amini et al. 2024 (arXiv 2402.10571).
    """
    assert scores.margins is not None
    offset = params.alpha * torch.log(scores.margins).to(scores.deltas.dtype)
    return -F.logsigmoid(params.beta * scores.deltas - offset)


class ConstantMarginParams(Params):
    loss_type: Literal["constant_margin"] = "constant_margin"
    beta: Beta = 0.1
    margin: Annotated[float, Field(description="offset that is the same for every pair")] = 1.0


@objective(ConstantMarginParams, {"reference"}, epilogue=lambda margins, p: EdgeLoss(p.beta, offset=p.margin))
def constant_margin(scores: EdgeScores, params: ConstantMarginParams) -> Tensor:
    """L = -log sigmoid(beta D - m)."""
    return -F.logsigmoid(params.beta * scores.deltas - params.margin)


class RDPOParams(Params):
    loss_type: Literal["r_dpo"] = "r_dpo"
    beta: Beta = 0.1
    alpha: Annotated[float, Field(ge=0, description="factor on chosen minus rejected length")] = 0.02


@objective(RDPOParams, {"reference", "lengths"})
def r_dpo(scores: EdgeScores, params: RDPOParams) -> Tensor:
    """L = -log sigmoid(beta D + alpha (n_w - n_l)): a longer chosen completion has to gain less.

    Source: Park et al. 2024 (arXiv 2403.19159), from memory; one later repository has the other sign.
    """
    assert scores.chosen_lengths is not None and scores.rejected_lengths is not None
    longer = (scores.chosen_lengths - scores.rejected_lengths).to(scores.deltas.dtype)
    return -F.logsigmoid(params.beta * scores.deltas + params.alpha * longer)


class DPOShiftParams(Params):
    loss_type: Literal["dpo_shift"] = "dpo_shift"
    beta: Beta = 0.1
    lam: Annotated[Lambda, Field(description="factor on the rejected log-ratio; 1 is DPO")] = 0.75


@objective(DPOShiftParams, {"reference"})
def dpo_shift(scores: EdgeScores, params: DPOShiftParams) -> Tensor:
    """L = -log sigmoid(beta (a - lambda b)): the rejected completion counts less, 1 is DPO.

    Source: Yang et al. 2025 (arXiv 2502.07599) and the authors' code.
    """
    gap = scores.chosen_logratios - params.lam * scores.rejected_logratios
    return -F.logsigmoid(params.beta * gap)


class MMPOParams(Params):
    loss_type: Literal["mmpo"] = "mmpo"
    beta: Beta = 0.1
    gamma: Annotated[float, Field(gt=0, description="factor on the margins of the data set")] = 1.1


@objective(MMPOParams, {"reference", "margins"})
def mmpo(scores: EdgeScores, params: MMPOParams) -> Tensor:
    """L = -p log sigmoid(z) - (1 - p) log sigmoid(-z), p = sigmoid(gamma h), z = beta D.

    Source: Kim et al. 2024 (arXiv 2410.03145); p from the authors' code, the cross entropy assumed.
    """
    assert scores.margins is not None
    z = params.beta * scores.deltas
    p = torch.sigmoid(params.gamma * scores.margins).to(z.dtype)
    return -p * F.logsigmoid(z) - (1 - p) * F.logsigmoid(-z)


class TODOParams(Params):
    loss_type: Literal["todo"] = "todo"
    beta: Beta = 0.1
    theta: Annotated[float, Field(gt=0, description="half the width of a tie, in rewards")] = 0.5
    tie_margin: Annotated[float, Field(ge=0, description="largest |margin| of a pair that is a tie")] = 0.0


@objective(TODOParams, {"reference", "margins"})
def todo(scores: EdgeScores, params: TODOParams) -> Outcome:
    """L = -log sigmoid(z - t) for a preference, softplus(t + z) + softplus(t - z) - log(e^2t - 1) for a tie.

    z = beta D, t = theta; a pair is a tie where |h| <= tie_margin. The three outcomes of the Rao-Kupper
    model: their probabilities sum to one.
    Source: Guo et al. 2024 (TODO) and the authors' code.
    """
    assert scores.margins is not None
    z, t = params.beta * scores.deltas, params.theta
    tie = scores.margins.abs() <= params.tie_margin
    # log(e^2t - 1) without overflow for large t.
    tied = F.softplus(t + z) + F.softplus(t - z) - (2 * t + math.log(-math.expm1(-2 * t)))
    return Outcome(torch.where(tie, tied, -F.logsigmoid(z - t)), {"todo/ties": tie.double()})
