"""Pairs in memory as a training source, whose packing can be made worse to measure what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from madpo.benchmarks.step.workload import Pair
from madpo.trainer.data.groups import GroupCounts, ReferenceLogps, TokenGroups
from madpo.trainer.data.lengths import Shapes
from madpo.trainer.data.tokenise import TokenGroup

Packing = Literal["balanced", "counted", "alone"]
"""Micro-batches of equal cost; of equal numbers of pairs; of one pair."""


class PairGroups:
    """The pairs as groups of two completions; `claimed` is the length each pair pretends to have."""

    def __init__(self, pairs: Sequence[Pair], claimed: int | None) -> None:
        self._groups = [
            TokenGroup(prompt, [chosen, rejected], [(0, 1, None)], [1, -1])
            for prompt, chosen, rejected in pairs
        ]
        counts = [[len(tokens) for tokens in pair] for pair in pairs]
        ones = np.ones(len(pairs), dtype=np.int64)
        lengths = np.array([sum(lengths) for lengths in counts]) if claimed is None else claimed * ones
        completion_tokens = np.array([chosen + rejected for _, chosen, rejected in counts])
        self.counts = GroupCounts.all_computed(
            lengths=lengths,
            completion_tokens=completion_tokens,
            scored_tokens=completion_tokens,
            sequences=2 * ones,
            edges=ones,
            labelled=2 * ones,
        )
        self.reference: ReferenceLogps | None = None
        self.rows = np.arange(len(pairs))
        self._completions = np.array([tails if claimed is None else [0, 0] for _, *tails in counts])

    def __getitem__(self, index: int) -> TokenGroup:
        return self._groups[index]

    def shapes(self, indices: np.ndarray) -> Shapes:
        completions = self._completions[indices]
        prompts = self.counts.lengths[indices] - completions.sum(axis=1)
        return Shapes(prompts, self.counts.sequences[indices], completions.ravel())


class PairSource:
    """The pairs in order.

    Unless packing is balanced, all pairs claim one length: a micro-batch's, so that each is packed alone, or
    the mean, which gives as many micro-batches as balanced packing, of unequal cost.
    """

    content = "pairs of the benchmark"

    def __init__(self, pairs: Sequence[Pair], packing: Packing, budget: int) -> None:
        tokens = sum(len(part) for pair in pairs for part in pair)
        claimed = {"balanced": None, "counted": -(-tokens // len(pairs)), "alone": budget}[packing]
        self.groups: TokenGroups = PairGroups(pairs, claimed)
        self.num_groups: int | None = len(pairs)

    def take(self, consumed: int, count: int) -> tuple[TokenGroups, np.ndarray]:
        return self.groups, np.arange(consumed, consumed + count)

    def epoch(self, consumed: int) -> float:
        assert self.num_groups is not None
        return consumed / self.num_groups

    def report(self) -> dict[str, Any]:
        return {}
