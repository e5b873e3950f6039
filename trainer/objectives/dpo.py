"""Direct Preference Optimisation."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import EdgeLoss, Objective, Outcome, Params, Scored


class DPOParams(Params):
    loss_type: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0, description="strength of the pull to the reference")


def dpo(scored: Scored, params: DPOParams) -> Outcome:
    """L = -log sigmoid(beta * D), D = log-ratio of the winner minus log-ratio of the loser.

    Source: Rafailov et al. 2023 (arXiv 2305.18290), equation 7. Returns one loss per edge, (E,).
    """
    return Outcome(-F.logsigmoid(params.beta * scored.deltas))


def epilogue(margins: Tensor, params: DPOParams) -> EdgeLoss:
    return EdgeLoss(beta=params.beta)


OBJECTIVE = Objective(dpo, DPOParams, epilogue=epilogue)
