"""Views by the weights of edges: skip edges of weight 0, drop light ones, or draw groups by weight.

The weights are those that an objective declares: an edge's weight follows from its margin alone and
multiplies its loss. So it is known before anything is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import numpy as np
import torch
import xxhash

from madpo.trainer.data.groups import GroupCounts, ReferenceLogps, TokenDataset
from madpo.trainer.data.lengths import Shapes, in_two_parts, shapes_of
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.data.views.ragged import ranges, sums
from madpo.trainer.errors import UserError
from madpo.trainer.formats.text_groups import with_edges
from madpo.trainer.objectives.build import BoundObjective


def edge_weights(groups: TokenDataset, objective: BoundObjective) -> np.ndarray:
    """(E,) the weights that the objective gives the edges of all groups, in float64."""
    assert objective.weight is not None
    return objective.weight(torch.from_numpy(groups.margins.astype(np.float64))).numpy()


class TrimmedDataset:
    """A view of some groups with some of their edges, and the completions that these compare.

    A group that has no edge left has no tokens either, and is not computed.
    """

    def __init__(
        self,
        groups: TokenDataset,
        keep: np.ndarray,  # (E,) bool, of all edges
        selected: np.ndarray,  # (G,) indices of groups
        counted: np.ndarray,  # (G,) edges that each group counts as in the mean loss
        factors: np.ndarray | None = None,  # (E,) of all edges, replace the objective's weights
    ) -> None:
        all_counts = groups.counts
        assert all_counts.edges.all()
        content = xxhash.xxh3_64_hexdigest(np.packbits(keep).tobytes() + selected.astype(np.int64).tobytes())
        self.name, self.fingerprint = groups.name, f"{groups.fingerprint}, trimmed {content}"
        self.reference: ReferenceLogps | None = None
        self._groups, self._keep, self._selected, self._factors = groups, keep, selected, factors
        self._firsts = np.cumsum(all_counts.edges) - all_counts.edges
        edges = sums(keep.astype(np.int64), all_counts.edges)
        self._is_whole = edges == all_counts.edges
        has_edges = edges > 0
        lengths = all_counts.lengths * has_edges
        completion_tokens = all_counts.completion_tokens * has_edges
        scored_tokens = all_counts.scored_tokens * has_edges
        sequences = all_counts.sequences * has_edges
        labelled = all_counts.labelled * has_edges
        for index in np.flatnonzero(has_edges & ~self._is_whole):
            group = self._trimmed(index)
            completion_tokens[index] = sum(map(len, group.completions))
            scored_tokens[index] = sum(group.scored)
            lengths[index] = len(group.prompt) + completion_tokens[index]
            sequences[index] = len(group.completions)
            labelled[index] = sum(label != 0 for label in group.labels)
        self.counts = GroupCounts(
            lengths=lengths[selected],
            completion_tokens=completion_tokens[selected],
            scored_tokens=scored_tokens[selected],
            sequences=sequences[selected],
            edges=edges[selected],
            counted_edges=counted,
            labelled=labelled[selected],
        )

    @property
    def rows(self) -> np.ndarray:
        return self._groups.rows[self._selected]

    @property
    def prompt_hashes(self) -> np.ndarray:
        return self._groups.prompt_hashes[self._selected]

    @property
    def margins(self) -> np.ndarray:
        """(E,) margins of the edges that remain."""
        positions = ranges(self._groups.counts.edges, self._selected)
        return self._groups.margins[positions[self._keep[positions]]]

    def ease(self, order: str) -> np.ndarray | None:
        ease = self._groups.ease(order)
        return None if ease is None else ease[self._selected]

    def shapes(self, indices: np.ndarray) -> Shapes:
        selected = self._selected[indices]
        return in_two_parts(
            self._is_whole[selected],
            lambda at: self._groups.shapes(selected[at]),
            lambda at: shapes_of([self[int(index)] for index in indices[at]]),
        )

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> TokenGroup:
        return self._trimmed(self._selected[index])

    def _trimmed(self, index: int) -> TokenGroup:
        """The group at `index` of the groups underneath, with the edges that remain."""
        group, first = self._groups[int(index)], self._firsts[index]
        edges = slice(first, first + self._groups.counts.edges[index])
        if not self._is_whole[index]:
            group = trimmed(group, self._keep[edges].tolist())
        if self._factors is None:
            return group
        return replace(group, weights=self._factors[edges][self._keep[edges]].tolist())


def trimmed(group: TokenGroup, keep: Sequence[bool]) -> TokenGroup:
    """The group with the edges to keep, and the completions that they compare."""
    return with_edges(group, list(compress(group.edges, keep)))


def skip_weightless(groups: TokenDataset, weights: np.ndarray) -> TokenDataset:
    """Skip the edges whose weight is exactly 0. They still count in the mean, so losses and gradients stay
    those of all edges. `weights` (E,)."""
    keep = weights != 0
    if keep.all():
        return groups
    return TrimmedDataset(groups, keep, np.arange(len(groups)), groups.counts.edges)


def drop_light(
    groups: TokenDataset, weights: np.ndarray, least: float
) -> tuple[TokenDataset, dict[str, Any]]:
    """Drop the edges lighter than `least`, also from the mean; with numbers for the report.

    `weights` (E,). Raises UserError if no edge is left.
    """
    keep = weights >= least
    if not keep.any():
        raise UserError(
            f"data.min_weight: {least:g} is above the weight of every pair of {groups.name}, of which the "
            f"largest is {weights.max():g}; lower it"
        )
    report = {
        "pairs_below_min_weight": int((~keep).sum()),
        "share_of_weight_below": float(weights[~keep].sum() / weights.sum()),
    }
    if keep.all():
        return groups, report
    edges = sums(keep.astype(np.int64), groups.counts.edges)
    selected = np.flatnonzero(edges)
    remaining = TrimmedDataset(groups, keep, selected, counted=edges[selected])
    return remaining, report | {"groups": len(remaining), "tokens": int(remaining.counts.lengths.sum())}


def draw_by_weight(groups: TokenDataset, weights: np.ndarray) -> tuple[TokenDataset, np.ndarray]:
    """A view for drawing groups by weight, and (G,) the weights W to draw by, each the sum over its edges.

    With E edges of weights w, the mean that training descends is L = sum_e w_e l_e / E. Draw group g with
    probability W_g / sum W, and count it as one item of loss sum_{e in g} (sum W / E) (w_e / W_g) l_e: its
    expectation is L, whatever the sizes of groups. A single pair has the factor sum W / E, the mean weight.
    Raises UserError if all weights are 0.
    """
    group_weights = sums(weights, groups.counts.edges)
    if not group_weights.any():
        raise UserError(f"data.sampling: all pairs of {groups.name} have weight 0; none can be drawn")
    share = weights / np.repeat(np.where(group_weights > 0, group_weights, 1.0), groups.counts.edges)
    view = TrimmedDataset(
        groups,
        keep=weights != 0,
        selected=np.arange(len(groups)),
        counted=np.ones_like(groups.counts.edges),
        factors=weights.mean() * share,
    )
    return view, group_weights
