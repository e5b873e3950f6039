"""Losses that look at chosen and rejected completion separately, not only at their difference."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import Params, objective
from madpo.trainer.objectives.fields import Beta
from madpo.trainer.objectives.scores import EdgeScores


class CalDPOParams(Params):
    loss_type: Literal["cal_dpo"] = "cal_dpo"
    beta: Beta = 0.001
    weight: Annotated[float, Field(ge=0, description="weight of the two squared terms")] = 0.5


@objective(CalDPOParams, {"reference"})
def cal_dpo(scores: EdgeScores, params: CalDPOParams) -> Tensor:
    """L = -log sigmoid(a - b) + w ((a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2).

    beta is not inside the sigmoid. Source: Xiao et al. 2024 (arXiv 2412.14516) and the authors' code.
    """
    target = 1 / (2 * params.beta)
    squares = (scores.chosen_logratios - target).square() + (scores.rejected_logratios + target).square()
    return -F.logsigmoid(scores.deltas) + params.weight * squares


class CalDPOHingeParams(Params):
    loss_type: Literal["cal_dpo_hinge"] = "cal_dpo_hinge"
    beta: Beta = 0.1
    alpha: Annotated[float, Field(ge=0, description="weight of the hinge on the chosen reward")] = 1.0
    tau: Annotated[float, Field(description="reward that the chosen completion should reach")] = 1.0


@objective(CalDPOHingeParams, {"reference"})
def cal_dpo_hinge(scores: EdgeScores, params: CalDPOHingeParams) -> Tensor:
    """L = -log sigmoid(beta D) + alpha max(0, tau - beta a): one-sided, on the chosen reward alone.

    Not the form of the Cal-DPO paper, which is `cal_dpo`; the defaults are assumed.
    """
    shortfall = torch.relu(params.tau - params.beta * scores.chosen_logratios)
    return -F.logsigmoid(params.beta * scores.deltas) + params.alpha * shortfall


class SPPOHardParams(Params):
    loss_type: Literal["sppo_hard"] = "sppo_hard"
    beta: Beta = 0.001


@objective(SPPOHardParams, {"reference"})
def sppo_hard(scores: EdgeScores, params: SPPOHardParams) -> Tensor:
    """L = (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2.

    Source: Wu et al. 2024 (arXiv 2405.00675), with win probabilities of 1 and 0.
    """
    target = 0.5 / params.beta
    return (scores.chosen_logratios - target).square() + (scores.rejected_logratios + target).square()


class NCAParams(Params):
    loss_type: Literal["nca_pair"] = "nca_pair"
    beta: Beta = 0.01


@objective(NCAParams, {"reference"})
def nca_pair(scores: EdgeScores, params: NCAParams) -> Tensor:
    """L = -log sigmoid(beta a) - (log sigmoid(-beta a) + log sigmoid(-beta b)) / 2.

    Source: Chen et al. 2024 (arXiv 2402.05369).
    """
    won, lost = params.beta * scores.chosen_logratios, params.beta * scores.rejected_logratios
    return -F.logsigmoid(won) - 0.5 * (F.logsigmoid(-won) + F.logsigmoid(-lost))


class BCOParams(Params):
    loss_type: Literal["bco_pair"] = "bco_pair"
    beta: Beta = 0.01
    delta: Annotated[
        float, Field(description="reward at which a completion counts as neither good nor bad")
    ] = 0.0


@objective(BCOParams, {"reference"})
def bco_pair(scores: EdgeScores, params: BCOParams) -> Tensor:
    """L = -log sigmoid(beta a - delta) - log sigmoid(-(beta b - delta)).

    The paper's delta is a running mean of rewards; TRL has 0 now, as here.
    Source: Jung et al. 2024 (arXiv 2404.04656).
    """
    won, lost = params.beta * scores.chosen_logratios, params.beta * scores.rejected_logratios
    return -F.logsigmoid(won - params.delta) - F.logsigmoid(params.delta - lost)


class APOZeroParams(Params):
    loss_type: Literal["apo_zero"] = "apo_zero"
    beta: Beta = 0.1


@objective(APOZeroParams, {"reference"})
def apo_zero(scores: EdgeScores, params: APOZeroParams) -> Tensor:
    """L = 1 - sigmoid(beta a) + sigmoid(beta b): chosen up, rejected down.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """
    won, lost = params.beta * scores.chosen_logratios, params.beta * scores.rejected_logratios
    return torch.sigmoid(-won) + torch.sigmoid(lost)


class APODownParams(Params):
    loss_type: Literal["apo_down"] = "apo_down"
    beta: Beta = 0.1


@objective(APODownParams, {"reference"})
def apo_down(scores: EdgeScores, params: APODownParams) -> Tensor:
    """L = sigmoid(beta a) + 1 - sigmoid(beta D): both down, the rejected further.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266).
    """
    won = torch.sigmoid(params.beta * scores.chosen_logratios)
    return won + torch.sigmoid(-params.beta * scores.deltas)


class AnchoredParams(Params):
    loss_type: Literal["anchored_dpo"] = "anchored_dpo"
    beta: Beta = 0.1
    anchor: Annotated[Literal["linear", "lse", "hinge"], Field(description="form of the anchor")] = "hinge"
    alpha: Annotated[float, Field(ge=0, description="weight of the anchor")] = 1.0
    tau: Annotated[
        float, Field(description="hinge anchor: chosen above tau and rejected below -tau cost nothing")
    ] = 1.0


@objective(AnchoredParams, {"reference"})
def anchored_dpo(scores: EdgeScores, params: AnchoredParams) -> Tensor:
    """L = -log sigmoid(beta D) + alpha anchor, for plain scores s+ and s- of any model.

    linear: -(s+ + s_ref+) + (s- + s_ref-). lse: log(e^-(s+ + s_ref+) + e^(s- + s_ref-)). hinge:
    max(0, tau - s+) + max(0, s- + tau). The first two are unbounded below. The defaults are assumed.
    """
    won, lost = scores.chosen_logps, scores.rejected_logps
    assert scores.ref_chosen_logps is not None and scores.ref_rejected_logps is not None
    up, down = -(won + scores.ref_chosen_logps), lost + scores.ref_rejected_logps
    if params.anchor == "linear":
        anchor = up + down
    elif params.anchor == "lse":
        anchor = torch.logaddexp(up, down)
    else:
        anchor = torch.relu(params.tau - won) + torch.relu(lost + params.tau)
    return -F.logsigmoid(params.beta * scores.deltas) + params.alpha * anchor
