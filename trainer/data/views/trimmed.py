"""Groups seen through the weights of their edges: without those of weight 0, without light ones, or to be
drawn by weight.

A weight here is one that an objective declares: a number of the margin alone that multiplies the edge's
loss. So it is known before anything is computed.
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
    """(E,) the weights that an objective gives the edges of all groups, in float64."""
    assert objective.weight is not None
    return objective.weight(torch.from_numpy(groups.margins.astype(np.float64))).numpy()


class TrimmedDataset:
    """Some groups with some of their edges, and with the completions that these compare.

    A group without any edge left has no tokens and is not computed.
    """

    def __init__(
        self,
        groups: TokenDataset,
        keep: np.ndarray,  # (E,) which of all edges
        selected: np.ndarray,  # (G,) which of all groups
        counted: np.ndarray,  # (G,) edges that each stands for in the mean of a step
        factors: np.ndarray | None = None,  # (E,) of all edges, in place of the objective's weights
    ) -> None:
        all_counts = groups.counts
        assert all_counts.edges.all()
        seen = xxhash.xxh3_64_hexdigest(np.packbits(keep).tobytes() + selected.astype(np.int64).tobytes())
        self.name, self.fingerprint = groups.name, f"{groups.fingerprint}, trimmed {seen}"
        self.reference: ReferenceLogps | None = None
        self._groups, self._keep, self._selected, self._factors = groups, keep, selected, factors
        self._firsts = np.cumsum(all_counts.edges) - all_counts.edges
        kept = sums(keep.astype(np.int64), all_counts.edges)
        self._whole = kept == all_counts.edges
        names = "lengths", "completion_tokens", "sequences", "labelled"
        counts = {name: getattr(all_counts, name) * (kept > 0) for name in names}
        for index in np.flatnonzero((kept > 0) & ~self._whole):
            group = self._trimmed(index)
            counts["completion_tokens"][index] = tokens = sum(map(len, group.completions))
            counts["lengths"][index] = len(group.prompt) + tokens
            counts["sequences"][index] = len(group.completions)
            counts["labelled"][index] = sum(label != 0 for label in group.labels)
        of_selected = {name: values[selected] for name, values in counts.items()}
        self.counts = GroupCounts(**of_selected, edges=kept[selected], counted_edges=counted)

    @property
    def rows(self) -> np.ndarray:
        return self._groups.rows[self._selected]

    @property
    def prompt_hashes(self) -> np.ndarray:
        return self._groups.prompt_hashes[self._selected]

    @property
    def margins(self) -> np.ndarray:
        """(E,) of the edges that are left."""
        places = ranges(self._groups.counts.edges, self._selected)
        return self._groups.margins[places[self._keep[places]]]

    def ease(self, order: str) -> np.ndarray | None:
        ease = self._groups.ease(order)
        return None if ease is None else ease[self._selected]

    def shapes(self, indices: np.ndarray) -> Shapes:
        selected = self._selected[indices]
        return in_two_parts(
            self._whole[selected],
            lambda places: self._groups.shapes(selected[places]),
            lambda places: shapes_of([self[int(index)] for index in indices[places]]),
        )

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> TokenGroup:
        return self._trimmed(self._selected[index])

    def _trimmed(self, index: int) -> TokenGroup:
        """Of all groups the one at this place."""
        group, first = self._groups[int(index)], self._firsts[index]
        edges = slice(first, first + self._groups.counts.edges[index])
        if not self._whole[index]:
            group = trimmed(group, self._keep[edges].tolist())
        if self._factors is None:
            return group
        return replace(group, weights=self._factors[edges][self._keep[edges]].tolist())


def trimmed(group: TokenGroup, keep: Sequence[bool]) -> TokenGroup:
    """The group with some of its edges, and the completions that take part in them."""
    return with_edges(group, list(compress(group.edges, keep)))


def skip_weightless(groups: TokenDataset, weights: np.ndarray) -> TokenDataset:
    """The groups without the edges whose weight is exactly 0, which count in the mean as before: the same
    losses and gradients. `weights` (E,)."""
    keep = weights != 0
    if keep.all():
        return groups
    return TrimmedDataset(groups, keep, np.arange(len(groups)), groups.counts.edges)


def drop_light(
    groups: TokenDataset, weights: np.ndarray, least: float
) -> tuple[TokenDataset, dict[str, Any]]:
    """The groups without the edges lighter than `least`, which then count no more, and a report of that.

    `weights` (E,). Raises UserError if none is left.
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
    kept = sums(keep.astype(np.int64), groups.counts.edges)
    selected = np.flatnonzero(kept)
    left = TrimmedDataset(groups, keep, selected, kept[selected])
    return left, report | {"groups": len(left), "tokens": int(left.counts.lengths.sum())}


def draw_by_weight(groups: TokenDataset, weights: np.ndarray) -> tuple[TokenDataset, np.ndarray]:
    """The groups as they are to be drawn, and (G,) the weights W to draw them by: the sums over their edges.

    With E edges of weights w, the mean that training descends is L = sum_e w_e l_e / E. A group drawn with
    probability W_g / sum W that counts as one item of loss sum_{e in g} (sum W / E) (w_e / W_g) l_e has the
    expectation L, whatever the sizes of groups; pairs alone have the factor sum W / E, the mean weight.
    Raises UserError if all weights are 0.
    """
    of_groups = sums(weights, groups.counts.edges)
    if not of_groups.any():
        raise UserError(f"data.sampling: all pairs of {groups.name} have weight 0; none can be drawn")
    share = weights / np.repeat(np.where(of_groups > 0, of_groups, 1.0), groups.counts.edges)
    everything, one_item = np.arange(len(groups)), np.ones_like(groups.counts.edges)
    factors = weights.mean() * share
    return TrimmedDataset(groups, weights != 0, everything, one_item, factors), of_groups
