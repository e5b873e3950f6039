"""The cost of groups and steps, from the lengths of the groups: FLOPs, tokens, balance over ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from madpo.trainer.data.lengths import Shapes, Shared


@dataclass(frozen=True)
class Cost:
    """The cost of a group: linear in its tokens, scored tokens and attention pairs. In FLOPs, or in any unit
    where only proportions count."""

    per_token: float = 0.0
    per_row: float = 0.0  # per scored token: the output head computes no others
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

    def of(
        self,
        shapes: Shapes,
        shared: Shared = True,
        scored: np.ndarray | float = 1.0,  # (B,)
    ) -> np.ndarray:
        """(B,) cost of each group. `shared`: its prompt is computed once, else with every completion.
        `scored`: the share of its completions' tokens that masks do not leave out."""
        rows = shapes.totals(shapes.completions) * scored
        total = self.per_token * shapes.tokens(shared) + self.per_row * rows
        for window, each in self.per_attention_pair.items():
            total = total + each * shapes.attention_pairs(window, shared)
        return total


@dataclass(frozen=True)
class StepCost:
    """The cost of a step."""

    forward: Cost  # policy and reference
    backward: Cost = field(default_factory=Cost)
    again: Cost = field(default_factory=Cost)  # recomputed to save memory
    again_in_parts: Cost = field(default_factory=Cost)  # recomputed too if there are several micro-batches

    @property
    def model(self) -> Cost:
        """What the step's mathematics needs, without what is recomputed."""
        return self.forward + self.backward


TOKENS = StepCost(Cost(per_token=1.0))
"""Counts packed tokens, for want of a model."""


@dataclass(frozen=True)
class StepWork:
    """What one or several steps computed, on all ranks together."""

    tokens: int = 0  # packed
    unshared_tokens: int = 0  # if the prompt stood before every completion
    padded_tokens: int = 0  # if these sequences were also padded, in batches of whole groups
    flops: float = 0.0  # of the step's mathematics
    flops_again: float = 0.0  # recomputed
    busiest: float = 0.0  # cost of the busiest rank of each micro-batch, summed over micro-batches
    mean: float = 0.0  # cost of a rank, the mean over ranks
    skipped_edges: int = 0  # edges of weight 0, in the mean loss but not computed

    def __add__(self, other: StepWork) -> StepWork:
        sums = (a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        return StepWork(*sums)


def work_of(
    shapes: Shapes,
    cost: StepCost,
    plan: list[list[list[int]]],  # [rank][micro-batch] -> groups
    shared: Shared = True,
    scored: np.ndarray | float = 1.0,  # (B,) the share of completion tokens that are scored
    skipped_edges: int = 0,
) -> StepWork:
    """The work of a step whose groups `plan` spreads over ranks and micro-batches."""
    flops = cost.model.of(shapes, shared, scored)
    loads = np.array([[flops[groups].sum() for groups in rank] for rank in plan])  # (ranks, micro-batches)
    again = cost.again + cost.again_in_parts if loads.shape[1] > 1 else cost.again
    return StepWork(
        tokens=int(shapes.tokens(shared).sum()),
        unshared_tokens=int(shapes.tokens(shared=False).sum()),
        padded_tokens=shapes.padded_tokens(loads.size),
        flops=float(flops.sum()),
        flops_again=float(again.of(shapes, shared, scored).sum()),
        busiest=float(loads.max(0).sum()),
        mean=float(loads.sum() / len(plan)),
        skipped_edges=skipped_edges,
    )


def saved_by(
    shapes: Shapes,
    skipped: np.ndarray,  # (S,) bool
    cost: StepCost,
    shared: Shared = True,
    scored: np.ndarray | float = 1.0,  # (B,) the share of completion tokens that are scored
) -> StepWork:
    """The (negative) change in FLOPs if the second of two passes skips these completions; to be added to the
    step's work. It takes the same share of each completion of a group to be scored."""
    remaining = shapes.without(skipped)

    def change(part: Cost) -> float:
        return float((part.of(remaining, shared, scored) - part.of(shapes, shared, scored)).sum())

    return StepWork(flops=change(cost.backward), flops_again=change(cost.again + cost.again_in_parts))
