"""A weighted sum of several objectives of pairs."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from madpo.trainer.objectives.base import BatchState, Need, Outcome, Params, objective
from madpo.trainer.objectives.build import BoundObjective, build
from madpo.trainer.objectives.fields import Average
from madpo.trainer.objectives.reference_free import chosen_nll
from madpo.trainer.objectives.scores import EdgeScores

MPO: tuple[dict[str, Any], ...] = (
    {"loss_type": "dpo", "beta": 0.1},
    {"loss_type": "bco_pair", "beta": 0.1},
    {"loss_type": "chosen_nll"},
)


class WeightedSumParams(Params):
    loss_type: Literal["weighted_sum"] = "weighted_sum"
    terms: list[dict[str, Any]] = Field(
        default=list(MPO), min_length=1, description="objectives, each a loss_type with its parameters"
    )
    loss_weights: list[Annotated[float, Field(ge=0)]] = Field(
        default=[0.8, 0.2, 1.0], description="weights of the terms, one for each"
    )

    @model_validator(mode="after")
    def _terms_are_objectives_of_pairs(self) -> Self:
        if len(self.loss_weights) != len(self.terms):
            raise ValueError(f"loss_weights: {len(self.loss_weights)} for {len(self.terms)} terms")
        for term in self.terms:
            kind = term.get("loss_type")
            if not isinstance(kind, str) or kind == "weighted_sum":
                raise ValueError("terms: each needs a loss_type, and a sum cannot hold another")
        for bound in self.objectives:
            if bound.entry.view is not EdgeScores:
                raise ValueError(f"terms: {bound.entry.name} is no objective of pairs")
        if len({bound.is_reward_model for bound in self.objectives}) > 1:
            raise ValueError("terms: losses of reward models and of language models do not mix")
        return self

    @cached_property
    def objectives(self) -> list[BoundObjective]:
        """The terms as objectives. Raises ValueError for an unknown one."""
        return [build(term["loss_type"], **_without_type(term)) for term in self.terms]

    @property
    def quantiles(self) -> dict[str, float]:
        return {
            f"terms.{index}.{name}": q
            for index, bound in enumerate(self.objectives)
            for name, q in bound.params.quantiles.items()
        }

    def resolve(self, values: np.ndarray) -> Self:
        terms = [bound.params.resolve(values).model_dump(by_alias=True) for bound in self.objectives]
        return type(self)(terms=terms, loss_weights=self.loss_weights)

    def problem_with(self, margins: np.ndarray) -> str | None:
        problems = (bound.params.problem_with(margins) for bound in self.objectives)
        return next((problem for problem in problems if problem), None)

    @property
    def beta(self) -> float:
        """The first term's beta, for the metrics."""
        return self.objectives[0].beta


def _without_type(term: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in term.items() if key != "loss_type"}


def needs(params: WeightedSumParams) -> frozenset[Need]:
    return frozenset().union(*(bound.needs for bound in params.objectives))


@objective(WeightedSumParams, needs)
def weighted_sum(scores: EdgeScores, params: WeightedSumParams, state: BatchState) -> Outcome:
    """L = sum_k w_k L_k. The default is MPO: 0.8 DPO + 0.2 BCO + the chosen completion's NLL.

    Source: Wang et al. 2024 (MPO, arXiv 2411.10442) with TRL's weights.
    """
    total = torch.zeros_like(scores.chosen_logps)
    stats: dict[str, Tensor] = {}
    memory: dict[str, list[float]] = {}
    for index, (weight, bound) in enumerate(zip(params.loss_weights, params.objectives, strict=True)):
        prefix = f"{index} "  # two terms of one kind keep two memories
        own = {key.removeprefix(prefix): x for key, x in state.memory.items() if key.startswith(prefix)}
        outcome = bound.outcome(scores, BatchState(own, state.seed))
        total = total + weight * outcome.losses
        suffix = f"_{index}" if f"loss/{bound.entry.name}" in stats else ""
        stats |= {f"loss/{bound.entry.name}{suffix}": outcome.losses.detach()}
        stats |= {name + suffix: values for name, values in outcome.stats.items()}
        memory |= {prefix + key: values for key, values in outcome.memory.items()}
    return Outcome(total, stats, memory)


class ChosenNLLParams(Params):
    loss_type: Literal["chosen_nll"] = "chosen_nll"
    average: Average = True


@objective(ChosenNLLParams, {"lengths"})
def chosen_nll_of_pairs(scores: EdgeScores, params: ChosenNLLParams) -> Tensor:
    """L = NLL_w, per token or summed; TRL's `sft` as a term of a sum."""
    return chosen_nll(scores, params.average)
