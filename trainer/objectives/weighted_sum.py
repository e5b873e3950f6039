"""Several objectives of pairs at once."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from madpo.trainer.objectives.base import EdgeScores, Item, Outcome, Params, objective
from madpo.trainer.objectives.build import BoundObjective, build
from madpo.trainer.objectives.fields import Average
from madpo.trainer.objectives.reference_free import chosen_nll

MPO: tuple[dict[str, Any], ...] = (
    {"loss_type": "dpo", "beta": 0.1},
    {"loss_type": "bco_pair", "beta": 0.1},
    {"loss_type": "chosen_nll"},
)


class WeightedSumParams(Params):
    loss_type: Literal["weighted_sum"] = "weighted_sum"
    terms: list[dict[str, Any]] = Field(
        default=list(MPO), min_length=1, description="each a loss_type with its parameters"
    )
    loss_weights: list[float] = Field(default=[0.8, 0.2, 1.0], description="one for each term")

    @model_validator(mode="after")
    def _terms_are_objectives_of_pairs(self) -> Self:
        if len(self.loss_weights) != len(self.terms):
            raise ValueError(f"loss_weights: {len(self.loss_weights)} for {len(self.terms)} terms")
        for term in self.terms:
            if term.get("loss_type") in (None, "weighted_sum"):
                raise ValueError("terms: each needs a loss_type, and a sum cannot hold another")
        for bound in self.objectives:
            if bound.entry.item is not Item.EDGE:
                raise ValueError(f"terms: {bound.entry.name} is no objective of pairs")
        return self

    @cached_property
    def objectives(self) -> list[BoundObjective]:
        """The terms, built; raises ValueError for an unknown one."""
        return [build(**{"name": term["loss_type"], **_without_type(term)}) for term in self.terms]

    @property
    def beta(self) -> float:
        """The first term's, for the metrics."""
        return getattr(self.objectives[0].params, "beta", 1.0)


def _without_type(term: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in term.items() if key != "loss_type"}


def needs(params: WeightedSumParams) -> frozenset[str]:
    return frozenset().union(*(bound.needs for bound in params.objectives))


@objective(WeightedSumParams, needs)
def weighted_sum(scores: EdgeScores, params: WeightedSumParams) -> Outcome:
    """L = sum_k w_k L_k. The default is MPO: 0.8 DPO + 0.2 BCO + the chosen completion's NLL.

    Source: Wang et al. 2024 (MPO, arXiv 2411.10442) with TRL's weights.
    """
    losses = [bound(scores) for bound in params.objectives]
    total = sum(w * loss for w, loss in zip(params.loss_weights, losses, strict=True))
    assert isinstance(total, Tensor)
    names = (bound.entry.name for bound in params.objectives)
    return Outcome(total, {f"loss/{name}": loss.detach() for name, loss in zip(names, losses, strict=True)})


class ChosenNLLParams(Params):
    loss_type: Literal["chosen_nll"] = "chosen_nll"
    average: Average = True


@objective(ChosenNLLParams, {"lengths"})
def chosen_nll_of_pairs(scores: EdgeScores, params: ChosenNLLParams) -> Tensor:
    """L = NLL_w, per token or summed: a term for a sum, TRL's `sft`."""
    return chosen_nll(scores, params.average)
