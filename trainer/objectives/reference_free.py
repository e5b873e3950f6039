"""Losses without a reference: log-probs, most often per token, instead of log-ratios."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import EdgeLoss, Params, objective
from madpo.trainer.objectives.fields import Average, Gamma, Lambda, NLLWeight, Scale
from madpo.trainer.objectives.scores import EdgeScores


class SimPOParams(Params):
    loss_type: Literal["simpo"] = "simpo"
    beta: Scale = 2.0
    gamma: Gamma = 1.0


@objective(
    SimPOParams,
    {"lengths"},
    epilogue=lambda margins, p: EdgeLoss(p.beta, offset=p.gamma, length_normalised=True),
)
def simpo(scores: EdgeScores, params: SimPOParams) -> Tensor:
    """L = -log sigmoid(beta (u_w - u_l) - gamma), u = log-prob per token.

    Source: Meng et al. 2024 (arXiv 2405.14734), equation 6. The authors start at gamma / beta = 0.5.
    """
    return -F.logsigmoid(params.beta * (scores.chosen_means - scores.rejected_means) - params.gamma)


class AlphaPOParams(Params):
    loss_type: Literal["alphapo"] = "alphapo"
    beta: Scale = 2.5
    gamma: Gamma = 0.25
    alpha: Annotated[float, Field(description="curvature of the reward; 0 is SimPO")] = 0.25


@objective(AlphaPOParams, {"lengths"})
def alphapo(scores: EdgeScores, params: AlphaPOParams) -> Tensor:
    """L = -log sigmoid(beta (R(u_w) - R(u_l)) - gamma), R = (1 - p^-alpha) / alpha, p = e^u.

    Source: Gupta et al. 2025 (arXiv 2501.03884); the default of gamma is assumed.
    """

    def reward(mean: Tensor) -> Tensor:
        return mean if params.alpha == 0 else -torch.expm1(-params.alpha * mean) / params.alpha

    gap = reward(scores.chosen_means) - reward(scores.rejected_means)
    return -F.logsigmoid(params.beta * gap - params.gamma)


class ORPOParams(Params):
    loss_type: Literal["orpo"] = "orpo"
    lam: Annotated[Lambda, Field(description="weight of the odds-ratio loss beside the NLL")] = 0.1


@objective(ORPOParams, {"lengths"})
def orpo(scores: EdgeScores, params: ORPOParams) -> Tensor:
    """L = -u_w - lambda log sigmoid(log odds(p_w) - log odds(p_l)), odds(p) = p / (1 - p), p = e^u.

    The NLL is per token of the chosen completion. Source: Hong et al. 2024 (arXiv 2403.07691).
    """

    def log_odds(mean: Tensor) -> Tensor:
        return mean - _log1mexp(mean.clamp(max=-1e-7))

    gap = log_odds(scores.chosen_means) - log_odds(scores.rejected_means)
    return -scores.chosen_means - params.lam * F.logsigmoid(gap)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, by the formula that keeps its digits on either side of -log 2."""
    small = x > -0.6931471805599453
    near = torch.where(small, x, -1.0)
    far = torch.where(small, -1.0, x)
    return torch.where(small, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


class CPOParams(Params):
    loss_type: Literal["cpo"] = "cpo"
    beta: Scale = 0.1
    alpha: NLLWeight = 1.0
    average: Average = True


@objective(CPOParams, {"lengths"})
def cpo(scores: EdgeScores, params: CPOParams) -> Tensor:
    """L = -log sigmoid(beta (l_w - l_l)) + alpha NLL_w, the NLL per token or summed.

    Source: Xu et al. 2024 (arXiv 2401.08417).
    """
    gap = scores.chosen_logps - scores.rejected_logps
    return -F.logsigmoid(params.beta * gap) + params.alpha * chosen_nll(scores, params.average)


class CPOSimPOParams(Params):
    loss_type: Literal["cpo_simpo"] = "cpo_simpo"
    beta: Scale = 2.0
    gamma: Gamma = 1.0
    alpha: NLLWeight = 1.0
    average: Average = True


@objective(CPOSimPOParams, {"lengths"})
def cpo_simpo(scores: EdgeScores, params: CPOSimPOParams) -> Tensor:
    """L = -log sigmoid(beta (u_w - u_l) - gamma) + alpha NLL_w.

    Source: the CPO-SimPO repository (fe1ixxu/CPO_SIMPO).
    """
    gap = params.beta * (scores.chosen_means - scores.rejected_means) - params.gamma
    return -F.logsigmoid(gap) + params.alpha * chosen_nll(scores, params.average)


def chosen_nll(scores: EdgeScores, average: bool) -> Tensor:
    """(E,) negative log-likelihood of the chosen completion, per token or summed."""
    return -(scores.chosen_means if average else scores.chosen_logps)
