"""MixDPO: a preference loss on easy pairs, imitation of the chosen completion on difficult ones."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import Outcome, Params, objective
from madpo.trainer.objectives.fields import Beta, Gamma, LabelSmoothing, Threshold, number
from madpo.trainer.objectives.reference_free import chosen_nll
from madpo.trainer.objectives.scores import EdgeScores


class MixDPOParams(Params):
    loss_type: Literal["mixdpo"] = "mixdpo"
    beta: Beta = 0.01
    threshold: Threshold = Field(
        default=0.5, description="a pair with a smaller margin is difficult; or quantile:q of the margins"
    )
    base: Annotated[Literal["dpo", "simpo", "ipo"], Field(description="loss of the easy pairs")] = "dpo"
    label_smoothing: LabelSmoothing = 0.1
    gamma: Gamma = 0.0

    def resolve(self, values: np.ndarray) -> Self:
        """A copy with a threshold just above the quantile: at least a share q is difficult, with all ties."""
        numbers = {
            name: float(np.nextafter(np.quantile(values, q, method="inverted_cdf"), np.inf))
            for name, q in self.quantiles.items()
        }
        return self.model_copy(update=numbers)


def needs(params: MixDPOParams) -> frozenset[str]:
    return frozenset({"margins", "lengths"} | ({"reference"} if params.base != "simpo" else set()))


@objective(MixDPOParams, needs)
def mixdpo(scores: EdgeScores, params: MixDPOParams) -> Outcome:
    """L = NLL_w per token where h < threshold, else the base loss; h is the margin of the data.

    base dpo: -(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D); simpo: -log sigmoid(beta (u_w - u_l)
    - gamma); ipo: (D - 1 / (2 beta))^2. The authors advise a threshold at which about a tenth of the pairs
    are difficult (quantile:0.1), and an order from easy to hard.
    Source: Pang et al. 2026 (arXiv 2602.00954) and the authors' code.
    """
    assert scores.margins is not None
    difficult = scores.margins < number(params.threshold)
    losses = torch.where(difficult, chosen_nll(scores, average=True), _base(scores, params))
    return Outcome(losses, {"mixdpo/difficult": difficult.double()})


def _base(scores: EdgeScores, params: MixDPOParams) -> Tensor:
    if params.base == "ipo":
        return (scores.deltas - 1 / (2 * params.beta)).square()
    if params.base == "simpo":
        z = params.beta * (scores.chosen_means - scores.rejected_means) - params.gamma
        return -F.logsigmoid(z)
    z, e = params.beta * scores.deltas, params.label_smoothing
    return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)
