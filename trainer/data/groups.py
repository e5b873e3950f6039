"""Interfaces of token groups: what training, scoring and evaluation read, wherever the groups come from."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Protocol, Self, TypeVar

import datasets
import numpy as np

from madpo.trainer.data.lengths import Shapes, check_budget, joined
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError
from madpo.trainer.objectives.base import Item, Need
from madpo.trainer.objectives.build import BoundObjective


@dataclass(frozen=True)
class GroupCounts:
    """Counts of each group, from which steps are planned before a group is read."""

    lengths: np.ndarray  # (G,) packed tokens: prompt and completions
    completion_tokens: np.ndarray  # (G,) tokens of completions, scored or not
    scored_tokens: np.ndarray  # (G,)
    sequences: np.ndarray  # (G,) completions
    edges: np.ndarray  # (G,)
    labelled: np.ndarray  # (G,) sequences with a label 1 or -1
    # What is in the mean loss; a view may compute fewer.
    counted_edges: np.ndarray  # (G,)
    counted_labelled: np.ndarray  # (G,)
    counted_tokens: np.ndarray  # (G,)

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, indices: np.ndarray) -> Self:
        """The counts of the groups at `indices` (n,), as int64, whose products do not overflow."""
        return type(self)(*(getattr(self, field.name)[indices].astype(np.int64) for field in fields(self)))

    @classmethod
    def all_computed(
        cls,
        lengths: np.ndarray,  # (G,)
        completion_tokens: np.ndarray,  # (G,)
        scored_tokens: np.ndarray,  # (G,)
        sequences: np.ndarray,  # (G,)
        edges: np.ndarray,  # (G,)
        labelled: np.ndarray,  # (G,)
    ) -> Self:
        """The counts of groups that are computed as they are counted."""
        computed = lengths, completion_tokens, scored_tokens, sequences, edges, labelled
        return cls(*computed, edges, labelled, scored_tokens)

    @classmethod
    def concatenated(cls, parts: Iterable[GroupCounts]) -> Self:
        """The counts of several sets of groups in one, one set after another."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(x, field.name) for x in parts]) for field in fields(cls)))

    def computed_tokens(self, prefix_sharing: bool) -> np.ndarray:
        """(G,) tokens of each group in a packed row."""
        if prefix_sharing:
            return self.lengths
        return self.lengths + (np.maximum(self.sequences, 1) - 1) * (self.lengths - self.completion_tokens)

    def items(self, item: Item) -> np.ndarray:
        """(G,) items that each group has in the mean loss."""
        counted = {
            Item.EDGE: self.counted_edges,
            Item.SEQUENCE: self.counted_labelled,
            Item.TOKEN: self.counted_tokens,
        }
        return counted[item]

    def computed_items(self, item: Item) -> np.ndarray:
        """(G,) items of each group that are computed."""
        computed = {Item.EDGE: self.edges, Item.SEQUENCE: self.labelled, Item.TOKEN: self.scored_tokens}
        return computed[item]


@dataclass(frozen=True)
class ReferenceLogps:
    """The reference's log-probs of all scored tokens, group after group."""

    flat: np.ndarray  # (M,) float32
    starts: np.ndarray  # (G + 1,) where those of each group begin

    def __getitem__(self, index: int) -> np.ndarray:  # (m,)
        """The log-probs of one group."""
        return self.flat[self.starts[index] : self.starts[index + 1]]


class TokenGroups(Protocol):
    """Token groups by index, and the counts that batches are planned from."""

    reference: ReferenceLogps | None  # None unless the reference was scored before

    @property
    def counts(self) -> GroupCounts: ...

    @property
    def rows(self) -> np.ndarray:
        """(G,) the example that a group comes from: its line in a .jsonl file, else its number."""
        ...

    def __getitem__(self, index: int) -> TokenGroup: ...

    def shapes(self, indices: np.ndarray) -> Shapes:
        """The lengths of the groups at `indices` (B,), in that order."""
        ...


class TokenDataset(TokenGroups, Protocol):
    """The groups of a data set that is known as a whole; or a view, which is the same data seen otherwise."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Identifies the examples, and everything that made tokens and this view of them."""
        ...

    @property
    def prompt_hashes(self) -> np.ndarray:
        """(G,) a hash of each prompt's text."""
        ...

    @property
    def margins(self) -> np.ndarray:
        """(E,) margins of all edges; NaN where the data set has none."""
        ...

    @property
    def edge_weights(self) -> np.ndarray | None:
        """(E,) the data set's own factors on the losses of all edges; None if no example has a weight."""
        ...

    @property
    def completion_weights(self) -> np.ndarray | None:
        """(S,) factors on the losses of all completions; None if no example has a weight."""
        ...

    def ease(self, order: str) -> np.ndarray | None:
        """(G,) what `data.order` sorts by, largest first; None for shuffled. Raises UserError."""
        ...

    def __len__(self) -> int: ...


class TabledGroups(TokenDataset, Protocol):
    """Groups with a table that has one row for each. A view that joins or drops groups has none."""

    @property
    def table(self) -> datasets.Dataset:
        """Prompts, completions and edges as tokenised, without what a view adds."""
        ...


AnyGroups = TypeVar("AnyGroups", bound=TokenGroups)


def with_logps(
    groups: AnyGroups,
    flat: np.ndarray,  # (M,) float32, of all scored tokens
) -> AnyGroups:
    """A copy of the groups that carries the reference's log-probs."""
    starts = np.concatenate(([0], np.cumsum(groups.counts.scored_tokens, dtype=np.int64)))
    assert len(flat) == starts[-1]
    with_reference = copy.copy(groups)
    with_reference.reference = ReferenceLogps(flat, starts)
    return with_reference


class ConcatenatedGroups:
    """Several sets of groups in one, one set after another."""

    def __init__(self, parts: Sequence[TokenGroups]) -> None:
        self._parts = parts
        self._sizes = np.array([len(part.counts) for part in parts])
        self._ends = np.cumsum(self._sizes)
        self.counts = GroupCounts.concatenated(part.counts for part in parts)
        self.reference: ReferenceLogps | None = None  # a stream has none

    @property
    def rows(self) -> np.ndarray:
        return np.concatenate([part.rows for part in self._parts])

    def __getitem__(self, index: int) -> TokenGroup:
        part = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[part] - self._sizes[part])
        return self._parts[part][int(index) - first]

    def shapes(self, indices: np.ndarray) -> Shapes:
        part_of = np.searchsorted(self._ends, indices, side="right")
        firsts = self._ends - self._sizes
        shapes = [part.shapes(indices[part_of == i] - firsts[i]) for i, part in enumerate(self._parts)]
        return joined(shapes).at(np.argsort(np.argsort(part_of, kind="stable")))  # in the order of `indices`


def ease_of(
    name: str,
    order: str,
    margins: np.ndarray,  # (E,)
    edges: np.ndarray,  # (G,)
) -> np.ndarray | None:
    """(G,) what `data.order` sorts by, largest first; None for shuffled.

    easy_to_hard sorts by the mean margin of a group's edges. Raises UserError if a group has none.
    """
    if order == "shuffled":
        return None
    if order == "as_is":
        return -np.arange(len(edges), dtype=np.float64)
    if np.isnan(margins).any() or not edges.all():
        raise UserError(
            f"data.order: easy_to_hard sorts by margin, and {name} has pairs without one, or rows "
            "that are no pairs here; give a `margin` column (score of chosen minus score of rejected)"
        )
    return np.add.reduceat(margins, np.cumsum(edges) - edges) / edges


def check_groups(
    groups: TokenDataset, objective: BoundObjective, budget: int, prefix_sharing: bool = True
) -> None:
    """Raise UserError unless the groups have what the objective needs and fit into the token budget."""
    counts, loss_type = groups.counts, objective.loss_type
    check_budget(counts.computed_tokens(prefix_sharing), budget)
    if objective.item is Item.EDGE and not counts.edges.all():
        other = "kto, which takes labels" if counts.labelled.any() else "nll"
        raise UserError(
            f"{groups.name}: objective {loss_type} compares completions; give columns prompt, chosen "
            f"and rejected, or use loss_type {other}"
        )
    if Need.LABELS in objective.needs and not counts.labelled.all():
        bare = groups.rows[counts.labelled == 0]
        which = f"{len(bare)} of {len(groups)} rows have no label, the first is row {bare[0]}, and "
        raise UserError(
            f"{groups.name}: {which if counts.labelled.any() else ''}objective {loss_type} needs labels; "
            "give columns prompt, completion and label (true or false), or prompt, chosen and rejected"
        )
    if not objective.needs_margin:
        return
    owners = np.repeat(np.arange(len(groups)), counts.edges)
    missing = len(np.unique(owners[np.isnan(groups.margins)]))
    if missing:
        raise UserError(
            f"{groups.name}: {missing} of {len(groups)} rows have no margin, which objective "
            f"{loss_type} needs; score the pairs with a reward model (madpo reward, then madpo annotate), or "
            "give a `margin` column (score of chosen minus score of rejected), or use loss_type dpo"
        )
