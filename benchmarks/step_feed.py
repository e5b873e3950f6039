"""Pairs of tokens in memory, as the training loop takes its groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from madpo.benchmarks.step_workload import Pair
from madpo.trainer.data.feed import Groups
from madpo.trainer.data.reference_logps import ReferenceLogps
from madpo.trainer.data.shapes import Shapes
from madpo.trainer.data.tokenise import TokenGroup


class PairGroups:
    def __init__(self, pairs: Sequence[Pair], claimed: int | None) -> None:
        self._groups = [
            TokenGroup(prompt, [chosen, rejected], [(0, 1, None)], [1, -1])
            for prompt, chosen, rejected in pairs
        ]
        counts = [[len(tokens) for tokens in pair] for pair in pairs]
        ones = np.ones(len(pairs), dtype=np.int64)
        self.completion_tokens = np.array([chosen + rejected for _, chosen, rejected in counts])
        self.lengths = np.array([sum(lengths) for lengths in counts])
        if claimed is not None:
            self.lengths = claimed * ones
        self.sequences, self.edges, self.labelled = 2 * ones, ones, 2 * ones
        self.counted_edges = self.edges
        self.reference: ReferenceLogps | None = None
        self._completions = np.array([[chosen, rejected] for _, chosen, rejected in counts])

    def __getitem__(self, index: int) -> TokenGroup:
        return self._groups[index]

    def shapes(self, indices: np.ndarray) -> Shapes:
        prompts = (self.lengths - self.completion_tokens)[indices]
        return Shapes(prompts, self.sequences[indices], self._completions[indices].ravel())


class PairFeed:
    """The pairs in order. Where `claimed` is given, each says that it has so many tokens: with a whole
    micro-batch's, none is packed with another."""

    content = "pairs of the benchmark"

    def __init__(self, pairs: Sequence[Pair], claimed: int | None = None) -> None:
        self.groups: Groups = PairGroups(pairs, claimed)
        self.num_groups: int | None = len(pairs)

    def take(self, consumed: int, count: int) -> tuple[Groups, np.ndarray]:
        return self.groups, np.arange(consumed, consumed + count)

    def epoch(self, consumed: int) -> float:
        assert self.num_groups is not None
        return consumed / self.num_groups

    def report(self) -> dict[str, Any]:
        return {}
