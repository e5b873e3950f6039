"""Views of some groups, or of some edges of each; and groups whose losses have a further factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

import numpy as np
import xxhash

from madpo.trainer.data.groups import GroupCounts, ReferenceLogps, TokenDataset
from madpo.trainer.data.lengths import Shapes, in_two_parts, shapes_of
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.data.views.ragged import ranges, sums
from madpo.trainer.formats.text_groups import with_edges


class _View:
    """What the views of some groups have in common: what they know without looking into a group."""

    counts: GroupCounts

    def __init__(
        self,
        groups: TokenDataset,
        kept: np.ndarray,  # bool, for the fingerprint: what the view computes
        selected: np.ndarray,  # (n,) indices of groups
        factors: np.ndarray | None,  # (n,) on the losses of each selected group
    ) -> None:
        self.name, self.fingerprint = groups.name, f"{groups.fingerprint}, {_digest(kept, selected)}"
        self.reference: ReferenceLogps | None = None
        self._groups, self._selected, self._factors = groups, selected, factors

    @property
    def rows(self) -> np.ndarray:
        return self._groups.rows[self._selected]

    @property
    def prompt_hashes(self) -> np.ndarray:
        return self._groups.prompt_hashes[self._selected]

    @property
    def margins(self) -> np.ndarray:
        """(E,) margins of the view's edges."""
        return self._groups.margins[self._edges]

    @property
    def edge_weights(self) -> np.ndarray | None:
        """(E,) factors on the losses of the view's edges, without those of the groups."""
        weights = self._groups.edge_weights
        return None if weights is None else weights[self._edges]

    @property
    def _edges(self) -> np.ndarray:
        """(E,) the view's edges, as indices into those of the groups underneath."""
        return ranges(self._groups.counts.edges, self._selected)

    def ease(self, order: str) -> np.ndarray | None:
        ease = self._groups.ease(order)
        return None if ease is None else ease[self._selected]

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> TokenGroup:
        group = self._group(int(self._selected[index]))
        return group if self._factors is None else scaled(group, self._factors[index])

    def _group(self, index: int) -> TokenGroup:
        """What the view has of the group at `index` of the groups underneath."""
        return self._groups[index]


class SelectedDataset(_View):
    """A view of some groups. One that is not computed still counts in the mean loss."""

    def __init__(
        self,
        groups: TokenDataset,
        selected: np.ndarray,  # (n,) indices of groups
        is_computed: np.ndarray,  # (n,) bool
        factors: np.ndarray | None = None,  # (n,) on the losses of each group, which counts as one item then
    ) -> None:
        super().__init__(groups, is_computed, selected, factors)
        counts = groups.counts.at(selected)
        ones = np.ones_like(counts.edges)
        self.counts = GroupCounts(
            lengths=counts.lengths * is_computed,
            completion_tokens=counts.completion_tokens * is_computed,
            scored_tokens=counts.scored_tokens * is_computed,
            sequences=counts.sequences * is_computed,
            edges=counts.edges * is_computed,
            labelled=counts.labelled * is_computed,
            counted_edges=counts.counted_edges if factors is None else ones,
            counted_labelled=counts.counted_labelled if factors is None else ones,
            counted_tokens=counts.counted_tokens if factors is None else ones,
        )

    @property
    def completion_weights(self) -> np.ndarray | None:
        """(S,) factors on the losses of the completions, without those of the groups."""
        weights = self._groups.completion_weights
        return None if weights is None else weights[ranges(self._groups.counts.sequences, self._selected)]

    def shapes(self, indices: np.ndarray) -> Shapes:
        return self._groups.shapes(self._selected[indices])


class TrimmedDataset(_View):
    """A view of some groups with some of their edges, and the completions that these compare.

    A group that has no edge left has no tokens either, and is not computed.
    """

    def __init__(
        self,
        groups: TokenDataset,
        keep: np.ndarray,  # (E,) bool, of all edges
        selected: np.ndarray,  # (n,) indices of groups
        counted: np.ndarray,  # (n,) edges that each selected group counts as in the mean loss
        factors: np.ndarray | None = None,  # (n,) on the losses of each selected group
    ) -> None:
        super().__init__(groups, keep, selected, factors)
        all_counts = groups.counts
        assert all_counts.edges.all()
        self._keep = keep
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
            group = self._group(int(index))
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
            labelled=labelled[selected],
            counted_edges=counted,
            counted_labelled=labelled[selected],
            counted_tokens=scored_tokens[selected],
        )

    @property
    def completion_weights(self) -> np.ndarray | None:
        raise AssertionError("edges are trimmed for objectives of edges only")

    @property
    def _edges(self) -> np.ndarray:
        """(E,) the edges that remain, as indices into those of the groups underneath."""
        positions = super()._edges
        return positions[self._keep[positions]]

    def shapes(self, indices: np.ndarray) -> Shapes:
        selected = self._selected[indices]
        return in_two_parts(
            self._is_whole[selected],
            lambda at: self._groups.shapes(selected[at]),
            lambda at: shapes_of([self[int(index)] for index in indices[at]]),
        )

    def _group(self, index: int) -> TokenGroup:
        """The group with the edges that remain."""
        group, first = self._groups[index], self._firsts[index]
        if self._is_whole[index]:
            return group
        return trimmed(group, self._keep[first : first + self._groups.counts.edges[index]].tolist())


def trimmed(group: TokenGroup, keep: Sequence[bool]) -> TokenGroup:
    """The group with the edges to keep, and the completions that they compare."""
    weights = list(compress(group.edge_weights, keep))
    return replace(with_edges(group, list(compress(group.edges, keep))), edge_weights=weights)


def scaled(group: TokenGroup, factor: float) -> TokenGroup:
    """The group with a further factor on all of its losses."""
    edges = group.edge_weights or [1.0] * len(group.edges)
    completions = group.completion_weights or [1.0] * len(group.completions)
    return replace(
        group,
        edge_weights=[float(factor * weight) for weight in edges],
        completion_weights=[float(factor * weight) for weight in completions],
    )


def _digest(keep: np.ndarray, selected: np.ndarray) -> str:
    """Identifies what a view keeps of the groups underneath."""
    content = np.packbits(keep).tobytes() + selected.astype(np.int64).tobytes()
    return f"trimmed {xxhash.xxh3_64_hexdigest(content)}"
