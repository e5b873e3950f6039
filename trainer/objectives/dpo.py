"""Direct Preference Optimisation, and its variants for wrong labels and for length."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from madpo.trainer.objectives.base import EdgeLoss, Params, objective
from madpo.trainer.objectives.fields import Beta, LabelSmoothing
from madpo.trainer.objectives.scores import EdgeScores


class DPOParams(Params):
    loss_type: Literal["dpo"] = "dpo"
    beta: Beta = 0.1


@objective(DPOParams, {"reference"}, epilogue=lambda margins, p: EdgeLoss(p.beta))
def dpo(scores: EdgeScores, params: DPOParams) -> Tensor:
    """L = -log sigmoid(beta D), D = log-ratio of the chosen minus log-ratio of the rejected.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    """
    return -F.logsigmoid(params.beta * scores.deltas)


class CDPOParams(Params):
    loss_type: Literal["cdpo"] = "cdpo"
    beta: Beta = 0.1
    label_smoothing: LabelSmoothing = 0.1


@objective(
    CDPOParams,
    {"reference"},
    epilogue=lambda margins, p: EdgeLoss(p.beta, positive=1 - p.label_smoothing, negative=p.label_smoothing),
)
def cdpo(scores: EdgeScores, params: CDPOParams) -> Tensor:
    """L = -(1 - e) log sigmoid(z) - e log sigmoid(-z), z = beta D.

    Source: Mitchell 2023 (ericmitchell.ai/cdpo.pdf), equation 3.
    """
    z, e = params.beta * scores.deltas, params.label_smoothing
    return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)


class RobustParams(Params):
    loss_type: Literal["robust"] = "robust"
    beta: Beta = 0.1
    label_smoothing: LabelSmoothing = 0.1


@objective(
    RobustParams,
    {"reference"},
    epilogue=lambda margins, p: EdgeLoss(
        p.beta,
        positive=(1 - p.label_smoothing) / (1 - 2 * p.label_smoothing),
        negative=-p.label_smoothing / (1 - 2 * p.label_smoothing),
    ),
)
def robust(scores: EdgeScores, params: RobustParams) -> Tensor:
    """L = (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2e): unbiased if a share e of the labels
    is reversed; may be negative.

    Source: Chowdhury et al. 2024 (arXiv 2403.00409).
    """
    z, e = params.beta * scores.deltas, params.label_smoothing
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


class SigmoidNormParams(Params):
    loss_type: Literal["sigmoid_norm"] = "sigmoid_norm"
    beta: Beta = 5.0


@objective(
    SigmoidNormParams,
    {"reference", "lengths"},
    epilogue=lambda margins, p: EdgeLoss(p.beta, length_normalised=True),
)
def sigmoid_norm(scores: EdgeScores, params: SigmoidNormParams) -> Tensor:
    """L = -log sigmoid(beta (a / n_w - b / n_l)): log-ratios per token.

    Source: Tulu 3 (arXiv 2411.15124); the default of beta from memory.
    """
    won, lost = scores.counts
    return -F.logsigmoid(params.beta * (scores.chosen_logratios / won - scores.rejected_logratios / lost))
