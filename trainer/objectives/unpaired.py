"""Losses of single completions with a label, desirable or undesirable."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import Item, Outcome, Params, objective
from madpo.trainer.objectives.fields import Beta
from madpo.trainer.objectives.scores import SequenceScores

DesirableWeight = Annotated[float, Field(gt=0, description="weight of desirable completions")]
UndesirableWeight = Annotated[float, Field(gt=0, description="weight of undesirable completions")]


class KTOParams(Params):
    loss_type: Literal["kto"] = "kto"
    beta: Beta = 0.1
    desirable_weight: DesirableWeight = 1.0
    undesirable_weight: UndesirableWeight = 1.0


@objective(KTOParams, {"reference", "labels", "mismatched", "batch"}, item=Item.SEQUENCE)
def kto(scores: SequenceScores, params: KTOParams) -> Outcome:
    """L = w_D (1 - sigmoid(beta (a - z0))) where desirable, w_U (1 - sigmoid(beta (z0 - a))) where not.

    a = log pi - log pi_ref. z0 = max(0, mean of a over the completions with label 0), which belong to
    another prompt, estimates the KL over the step, without a gradient. Label 0 has loss 0.
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), as TRL has it.
    """
    assert scores.labels is not None
    a, other = scores.logratios, scores.labels == 0
    kl = (a.detach() * other).sum() / other.sum().clamp(min=1)
    kl = kl.clamp(min=0)
    losses = _weights(scores.labels, params) * torch.sigmoid(params.beta * (kl - a) * scores.labels)
    return Outcome(losses, {"kto/kl": kl.expand_as(a)})


class APOZeroUnpairedParams(Params):
    loss_type: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"
    beta: Beta = 0.1
    desirable_weight: DesirableWeight = 1.0
    undesirable_weight: UndesirableWeight = 1.0


@objective(APOZeroUnpairedParams, {"reference", "labels"}, item=Item.SEQUENCE)
def apo_zero_unpaired(scores: SequenceScores, params: APOZeroUnpairedParams) -> Tensor:
    """L = w_D (1 - sigmoid(beta a)) where desirable, w_U sigmoid(beta a) where not: `kto` with z0 = 0.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), as TRL has it.
    """
    assert scores.labels is not None
    chance = torch.sigmoid(-params.beta * scores.logratios * scores.labels)
    return _weights(scores.labels, params) * chance


def _weights(labels: Tensor, params: KTOParams | APOZeroUnpairedParams) -> Tensor:
    return params.desirable_weight * (labels > 0) + params.undesirable_weight * (labels < 0)
