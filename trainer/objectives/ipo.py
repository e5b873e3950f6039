"""Losses with a target margin: IPO's square, and the hinges."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import EdgeLoss, Params, objective
from madpo.trainer.objectives.fields import Beta, Lambda
from madpo.trainer.objectives.scores import EdgeScores


class IPOParams(Params):
    loss_type: Literal["ipo"] = "ipo"
    beta: Beta = 0.1
    average: Annotated[bool, Field(description="log-ratios as means over tokens (true) or sums (false)")] = (
        True
    )


@objective(
    IPOParams,
    {"reference", "lengths"},
    epilogue=lambda margins, p: EdgeLoss(p.beta, curve="ipo", length_normalised=p.average),
)
def ipo(scores: EdgeScores, params: IPOParams) -> Tensor:
    """L = (D - 1 / (2 beta))^2, with log-ratios per token (`average`) or summed.

    The paper writes sums; TRL reports that its authors' results used averages.
    Source: Azar et al. 2023 (arXiv 2310.12036), equation 17.
    """
    won, lost = scores.counts if params.average else (1.0, 1.0)
    delta = scores.chosen_logratios / won - scores.rejected_logratios / lost
    return (delta - 1 / (2 * params.beta)).square()


class HingeParams(Params):
    loss_type: Literal["hinge"] = "hinge"
    beta: Beta = 0.1


@objective(HingeParams, {"reference"}, epilogue=lambda margins, p: EdgeLoss(p.beta, curve="hinge"))
def hinge(scores: EdgeScores, params: HingeParams) -> Tensor:
    """L = max(0, 1 - beta D).

    Source: Zhao et al. 2023 (SLiC, arXiv 2305.10425) with a reference, as TRL has it.
    """
    return torch.relu(1 - params.beta * scores.deltas)


class RSOParams(Params):
    loss_type: Literal["rso"] = "rso"
    beta: Beta = 0.05


@objective(RSOParams, {"reference"}, epilogue=lambda margins, p: EdgeLoss(p.beta, curve="hinge"))
def rso(scores: EdgeScores, params: RSOParams) -> Tensor:
    """L = max(0, 1 - gamma D): hinge-norm, for pairs sampled by rejection from the optimal policy.

    Source: Liu et al. 2023 (arXiv 2309.06657).
    """
    return torch.relu(1 - params.beta * scores.deltas)


class SLiCParams(Params):
    loss_type: Literal["slic_hf"] = "slic_hf"
    delta: Annotated[float, Field(gt=0, description="log-prob by which chosen should exceed rejected")] = 1.0
    lam: Annotated[Lambda, Field(description="weight of the chosen completion's log-likelihood")] = 0.1


@objective(SLiCParams)
def slic_hf(scores: EdgeScores, params: SLiCParams) -> Tensor:
    """L = max(0, delta - l_w + l_l) - lambda l_w, without a reference.

    Source: Zhao et al. 2023 (arXiv 2305.10425); the regulariser on the chosen completion as in HALOs.
    """
    gap = scores.chosen_logps - scores.rejected_logps
    return torch.relu(params.delta - gap) - params.lam * scores.chosen_logps
