"""DPO's difference of log-ratios with other curves and other divergences."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from madpo.trainer.objectives.base import Params, objective
from madpo.trainer.objectives.fields import Beta
from madpo.trainer.objectives.scores import EdgeScores


class EXOParams(Params):
    loss_type: Literal["exo_pair"] = "exo_pair"
    beta: Beta = 0.1
    eps: Annotated[float, Field(gt=0, lt=0.5, description="assumed probability that a label is wrong")] = 1e-3


@objective(EXOParams, {"reference"})
def exo_pair(scores: EdgeScores, params: EXOParams) -> Tensor:
    """L = KL(q || p) with q = (sigmoid(z), sigmoid(-z)) and p = (1 - e, e), z = beta D.

    Source: Ji et al. 2024 (arXiv 2402.00856).
    """
    z = params.beta * scores.deltas
    won = torch.sigmoid(z) * (F.logsigmoid(z) - math.log(1 - params.eps))
    return won + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(params.eps))


class DiscoPOPParams(Params):
    loss_type: Literal["discopop"] = "discopop"
    beta: Beta = 0.05
    tau: Annotated[float, Field(gt=0, description="temperature of the switch between the two losses")] = 0.05


@objective(DiscoPOPParams, {"reference"})
def discopop(scores: EdgeScores, params: DiscoPOPParams) -> Tensor:
    """L = -(1 - m) log sigmoid(z) + m e^-z, m = sigmoid(z / tau), z = beta D.

    Source: Lu et al. 2024 (arXiv 2406.08414).
    """
    z = params.beta * scores.deltas
    mixture = torch.sigmoid(z / params.tau)
    # m e^-z grows like e^(z (1 / tau - 1)) for negative z: formed as one exponential, it stays finite.
    exponential = torch.exp(F.logsigmoid(z / params.tau) - z)
    return -(1 - mixture) * F.logsigmoid(z) + exponential


class FDPOParams(Params):
    loss_type: Literal["f_dpo"] = "f_dpo"
    beta: Beta = 0.1
    divergence: Annotated[
        Literal["reverse_kl", "forward_kl", "js", "alpha"],
        Field(description="divergence that keeps the policy near the reference"),
    ] = "reverse_kl"
    alpha: Annotated[float, Field(gt=0, description="order of the alpha divergence, not 1")] = 0.5

    @model_validator(mode="after")
    def _alpha_is_not_one(self) -> Self:
        if self.divergence == "alpha" and self.alpha == 1:
            raise ValueError("alpha: 1 is the reverse KL divergence; set divergence: reverse_kl")
        return self


@objective(FDPOParams, {"reference"})
def f_dpo(scores: EdgeScores, params: FDPOParams) -> Tensor:
    """L = -log sigmoid(beta (g(a) - g(b))); g follows from the divergence between policy and reference.

    reverse_kl: g(x) = x (DPO). forward_kl: -e^-x. js: log sigmoid(x). alpha: e^((alpha - 1) x) / (alpha - 1),
    alpha as TRL has it. Exponents end at 80, where float32 would soon overflow.
    Source: Wang et al. 2023 (arXiv 2309.16240), table 1.
    """

    def g(ratio: Tensor) -> Tensor:
        if params.divergence == "reverse_kl":
            return ratio
        if params.divergence == "forward_kl":
            return -torch.exp((-ratio).clamp(max=80))
        if params.divergence == "js":
            return F.logsigmoid(ratio)
        return torch.exp(((params.alpha - 1) * ratio).clamp(max=80)) / (params.alpha - 1)

    return -F.logsigmoid(params.beta * (g(scores.chosen_logratios) - g(scores.rejected_logratios)))
