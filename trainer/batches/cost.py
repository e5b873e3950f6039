"""What groups and steps cost, from the lengths of the groups: operations of the model, tokens, balance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from madpo.trainer.data.lengths import Shapes


@dataclass(frozen=True)
class Cost:
    """What groups cost, as a linear function of what there is of them; in floating-point operations, or in
    any unit where only the proportions count."""

    per_token: float = 0.0
    per_row: float = 0.0  # per completion token, each of which the output head scores
    per_attention_pair: Mapping[int | None, float] = field(default_factory=dict)  # window -> cost of a pair

    def __add__(self, other: Cost) -> Cost:
        windows = self.per_attention_pair.keys() | other.per_attention_pair.keys()
        pairs = {
            w: self.per_attention_pair.get(w, 0.0) + other.per_attention_pair.get(w, 0.0) for w in windows
        }
        return Cost(self.per_token + other.per_token, self.per_row + other.per_row, pairs)

    def __mul__(self, factor: float) -> Cost:
        pairs = {window: factor * each for window, each in self.per_attention_pair.items()}
        return Cost(factor * self.per_token, factor * self.per_row, pairs)

    def of(self, shapes: Shapes, shared: bool = True) -> np.ndarray:
        """(B,) of each group, its prompt computed once or with every completion."""
        total = self.per_token * shapes.tokens(shared) + self.per_row * shapes.totals(shapes.completions)
        for window, each in self.per_attention_pair.items():
            total = total + each * shapes.attention_pairs(window, shared)
        return total


@dataclass(frozen=True)
class StepCost:
    """What a step costs."""

    forward: Cost  # of policy and reference
    backward: Cost = field(default_factory=Cost)
    again: Cost = field(default_factory=Cost)  # what is computed a second time, to save memory
    again_in_parts: Cost = field(default_factory=Cost)  # what else is, of a step of several micro-batches

    @property
    def model(self) -> Cost:
        """What the mathematics of the step asks for."""
        return self.forward + self.backward


TOKENS = StepCost(Cost(per_token=1.0))
"""Where no model is known."""


@dataclass(frozen=True)
class StepWork:
    """What one step or several were, over all ranks."""

    tokens: int = 0  # packed
    unshared_tokens: int = 0  # with the prompt before every completion
    padded_tokens: int = 0  # the same in batches of whole pairs, padded
    flops: float = 0.0  # of the model
    flops_again: float = 0.0
    busiest: float = 0.0  # cost of the rank with the most to do, summed over micro-batches
    mean: float = 0.0  # cost of a rank
    skipped_edges: int = 0  # comparisons of weight 0, which were not computed

    def __add__(self, other: StepWork) -> StepWork:
        sums = (a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        return StepWork(*sums)


def work_of(
    shapes: Shapes,
    cost: StepCost,
    plan: list[list[list[int]]],  # [rank][micro] -> groups
    shared: bool = True,
    skipped_edges: int = 0,
) -> StepWork:
    """What a step is whose groups are spread over ranks and micro-batches by `plan`."""
    flops = cost.model.of(shapes, shared)
    loads = np.array([[flops[positions].sum() for positions in rank] for rank in plan])  # (ranks, micro)
    again = cost.again + cost.again_in_parts if loads.shape[1] > 1 else cost.again
    return StepWork(
        int(shapes.tokens(shared).sum()),
        int(shapes.tokens(shared=False).sum()),
        shapes.padded_tokens(loads.size),
        float(flops.sum()),
        float(again.of(shapes, shared).sum()),
        float(loads.max(0).sum()),
        float(loads.sum() / len(plan)),
        skipped_edges,
    )


def spared(
    shapes: Shapes,
    left_out: np.ndarray,  # (S,) bool
    cost: StepCost,
    shared: bool = True,
) -> StepWork:
    """What is less, of a step in parts whose second pass has no completion that was left out; to be added."""
    left = shapes.without(left_out)

    def difference(of: Cost) -> float:
        return float(of.of(left, shared).sum() - of.of(shapes, shared).sum())

    return StepWork(flops=difference(cost.backward), flops_again=difference(cost.again + cost.again_in_parts))
