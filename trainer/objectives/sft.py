"""Supervised fine-tuning: functions of the probability of each completion token."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import Item, Params, objective
from madpo.trainer.objectives.fields import ProbabilityThreshold, number
from madpo.trainer.objectives.scores import Scored


class NLLParams(Params):
    loss_type: Literal["nll"] = "nll"


@objective(NLLParams, item=Item.TOKEN)
def nll(scored: Scored, params: NLLParams) -> Tensor:
    """L = -log p, p the probability of a completion token."""
    return -scored.token_logps


class FAlphaParams(Params):
    loss_type: Literal["f_alpha"] = "f_alpha"
    alpha: Annotated[float, Field(ge=0, description="shape of the loss: 0 is -log p, 1 is 1 - p")] = 1.0


@objective(FAlphaParams, item=Item.TOKEN)
def f_alpha(scored: Scored, params: FAlphaParams) -> Tensor:
    """L = (1 - p^alpha) / alpha: a larger alpha trains more on what the model already finds likely.

    For strong base models 1 is a good start, for weak ones 0.
    Source: Li et al. 2025 (arXiv 2510.00526).
    """
    logps = scored.token_logps
    if params.alpha < 1e-6:
        return -logps
    return -torch.expm1(params.alpha * logps) / params.alpha


class ThresholdedParams(Params):
    loss_type: Literal["thresholded_nll"] = "thresholded_nll"
    threshold: ProbabilityThreshold = Field(
        default=0.2,
        description="probability of a token; or quantile:q of the starting model's on the training set",
    )
    keep: Annotated[
        Literal["above", "below"], Field(description="train tokens of a probability above or below threshold")
    ] = "above"
    loss: Annotated[
        Literal["log", "linear"], Field(description="loss of a token: log is -log p, linear is 1 - p")
    ] = "log"


@objective(ThresholdedParams, item=Item.TOKEN)
def thresholded_nll(scored: Scored, params: ThresholdedParams) -> Tensor:
    """L = f(p) 1[p >= threshold], or 1[p <= threshold]; no gradient through the indicator.

    The mean is over all completion tokens; the authors' code divides by the number of trained ones. A
    quantile is taken of the starting model's probabilities before training, and stays that number.
    Source: Li et al. 2025 (arXiv 2510.00526), equation 4 and figure 5.
    """
    logps = scored.token_logps
    p = logps.detach().exp()
    threshold = number(params.threshold)
    is_trained = p >= threshold if params.keep == "above" else p <= threshold
    losses = -logps if params.loss == "log" else -torch.expm1(logps)
    return torch.where(is_trained, losses, 0.0)


class DFTParams(Params):
    loss_type: Literal["dft"] = "dft"


@objective(DFTParams, item=Item.TOKEN)
def dft(scored: Scored, params: DFTParams) -> Tensor:
    """L = -sg[p] log p: a log-likelihood whose gradient is that of 1 - p.

    Source: Wu et al. 2025 (arXiv 2508.05629).
    """
    logps = scored.token_logps
    return -logps.detach().exp() * logps
