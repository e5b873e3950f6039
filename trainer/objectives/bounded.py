"""DPO that keeps the chosen completion from losing probability."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import Params, objective
from madpo.trainer.objectives.fields import Average, Beta, Lambda, NLLWeight
from madpo.trainer.objectives.reference_free import chosen_nll
from madpo.trainer.objectives.scores import EdgeScores


class DPOPParams(Params):
    loss_type: Literal["dpop"] = "dpop"
    beta: Beta = 0.1
    lam: Annotated[Lambda, Field(description="penalty on a chosen completion below the reference")] = 5.0


@objective(DPOPParams, {"reference"})
def dpop(scores: EdgeScores, params: DPOPParams) -> Tensor:
    """L = -log sigmoid(beta (D - lambda max(0, -a))): a chosen completion below the reference costs.

    Source: Pal et al. 2024 (Smaug, arXiv 2402.13228), who use lambda 50 in places.
    """
    shortfall = torch.relu(-scores.chosen_logratios)
    return -F.logsigmoid(params.beta * (scores.deltas - params.lam * shortfall))


class BDPOParams(Params):
    loss_type: Literal["bdpo"] = "bdpo"
    beta: Beta = 0.1
    lam: Annotated[
        Lambda,
        Field(gt=0, lt=1, description="share of the policy in the mixture that bounds the rejected part"),
    ] = 0.5


@objective(BDPOParams, {"reference"})
def bdpo(scores: EdgeScores, params: BDPOParams) -> Tensor:
    """L = -log sigmoid(beta (a - log(lambda e^b + 1 - lambda))): the rejected part is bounded below.

    Source: Cho et al. 2025 (arXiv 2506.12725).
    """
    b = scores.rejected_logratios
    mixed = torch.logaddexp(b + math.log(params.lam), torch.full_like(b, math.log(1 - params.lam)))
    return -F.logsigmoid(params.beta * (scores.chosen_logratios - mixed))


class BPOParams(Params):
    loss_type: Literal["bpo"] = "bpo"
    beta: Beta = 0.1
    alpha: Annotated[float, Field(gt=0, description="factor on the rejected completion's log-ratio")] = 0.3


@objective(BPOParams, {"reference"})
def bpo(scores: EdgeScores, params: BPOParams) -> Tensor:
    """L = -log sigmoid(beta min(a, -alpha b)): whichever part lags is trained.

    Source: Sun et al. 2025 (arXiv 2506.03557) and the authors' code.
    """
    lagging = torch.minimum(scores.chosen_logratios, -params.alpha * scores.rejected_logratios)
    return -F.logsigmoid(params.beta * lagging)


class DPONLLParams(Params):
    loss_type: Literal["dpo_nll"] = "dpo_nll"
    beta: Beta = 0.1
    alpha: NLLWeight = 1.0
    average: Average = True


@objective(DPONLLParams, {"reference", "lengths"})
def dpo_nll(scores: EdgeScores, params: DPONLLParams) -> Tensor:
    """L = -log sigmoid(beta D) + alpha NLL_w, the NLL per token (IRPO) or summed (RPO).

    Source: Pang et al. 2024 (arXiv 2404.19733), alpha 1 per token; Liu et al. 2024 (arXiv 2405.16436),
    alpha 0.005 summed.
    """
    return -F.logsigmoid(params.beta * scores.deltas) + params.alpha * chosen_nll(scores, params.average)
