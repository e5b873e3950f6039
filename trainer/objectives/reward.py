"""Losses of reward models, which give every completion a score instead of a log-prob."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import Params, objective
from madpo.trainer.objectives.scores import EdgeScores


class BradleyTerryParams(Params):
    loss_type: Literal["bradley_terry"] = "bradley_terry"
    margin: Annotated[bool, Field(description="subtract the data set's margin from the gap")] = False
    center_rewards_coefficient: Annotated[
        float, Field(ge=0, description="weight of a pair's squared sum of scores; 0.01 in the paper")
    ] = 0.0


def needs(params: BradleyTerryParams) -> frozenset[str]:
    return frozenset({"scores", "margins"} if params.margin else {"scores"})


@objective(BradleyTerryParams, needs)
def bradley_terry(scores: EdgeScores, params: BradleyTerryParams) -> Tensor:
    """L = -log sigmoid(r_w - r_l - h) + eta (r_w + r_l)^2, h the margin of the data or 0.

    The scores r stand where other objectives have log-probs.
    Source: Bradley and Terry 1952; the margin from Touvron et al. 2023 (Llama 2, arXiv 2307.09288), the
    centring from Eisenstein et al. 2023 (arXiv 2312.09244).
    """
    won, lost = scores.chosen_logps, scores.rejected_logps
    gap = won - lost
    if params.margin:
        assert scores.margins is not None
        gap = gap - scores.margins.to(gap.dtype)
    return -F.logsigmoid(gap) + params.center_rewards_coefficient * (won + lost).square()
