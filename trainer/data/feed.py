"""What training takes its groups from: a whole data set in some order, or a stream."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.reference_logps import ReferenceLogps
from madpo.trainer.data.shapes import Shapes, joined
from madpo.trainer.data.tokenise import TokenGroup


class Groups(Protocol):
    """Token groups by index, and the counts that batches are planned from."""

    lengths: np.ndarray  # (G,) packed tokens
    completion_tokens: np.ndarray  # (G,)
    sequences: np.ndarray  # (G,)
    edges: np.ndarray  # (G,)
    counted_edges: np.ndarray  # (G,) of the mean, of which some views compute a part only
    labelled: np.ndarray  # (G,) sequences that are desirable or not
    reference: ReferenceLogps | None  # if it was scored before

    def __getitem__(self, index: int) -> TokenGroup: ...

    def shapes(self, indices: np.ndarray) -> Shapes:
        """The lengths of the groups at `indices` (B,), in that order."""
        ...


AnyGroups = TypeVar("AnyGroups", bound=Groups)


class Feed(Protocol):
    """An endless sequence of groups, the same on every rank, for any number of ranks and whenever asked:
    the number of groups consumed is all there is to resume from."""

    content: str  # what a continuation must find again
    num_groups: int | None  # of an epoch; None: not known before its end

    def take(self, consumed: int, count: int) -> tuple[Groups, np.ndarray]:
        """The groups at positions consumed .. consumed + count - 1: (count,) indices into some groups.

        Raises ValueError if they cannot be read or do not serve the objective.
        """
        ...

    def epoch(self, consumed: int) -> float:
        """How often the groups have been gone through."""
        ...

    def report(self) -> dict[str, Any]:
        """split -> what was read, cut and dropped so far."""
        ...


def content_of(groups: GroupDataset) -> str:
    """What a continuation of a run on these groups must find again."""
    return f"{len(groups)} groups, {groups.fingerprint}"


def with_logps(
    groups: AnyGroups,
    flat: np.ndarray,  # (M,) float32, of all completion tokens
) -> AnyGroups:
    """The same groups, with what the reference thinks of them."""
    starts = np.concatenate(([0], np.cumsum(groups.completion_tokens, dtype=np.int64)))
    assert len(flat) == starts[-1]
    out = copy.copy(groups)
    out.reference = ReferenceLogps(flat, starts)
    return out


class WholeSet:
    """A data set that is known as a whole, in the order of `data.order`, or drawn by weights (G,)."""

    def __init__(
        self,
        groups: GroupDataset,
        seed: int,
        order: str,
        report: dict[str, Any],
        weights: np.ndarray | None = None,
    ) -> None:
        self.content = content_of(groups)
        self.num_groups: int | None = len(groups)
        self._groups, self._report = groups, report
        self._order = DataOrder(len(groups), seed, groups.ease(order), weights)

    def seeing(self, groups: GroupDataset) -> WholeSet:
        """The same order of the same groups, about which more is known."""
        out = copy.copy(self)
        out._groups = groups
        return out

    def take(self, consumed: int, count: int) -> tuple[Groups, np.ndarray]:
        return self._groups, self._order.take(consumed, count)

    def epoch(self, consumed: int) -> float:
        return consumed / len(self._groups)

    def report(self) -> dict[str, Any]:
        return self._report


class Chained:
    """Several data sets as one, one after another."""

    def __init__(self, parts: Sequence[Groups]) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part.lengths) for part in parts])
        self.lengths = np.concatenate([part.lengths for part in parts])
        self.completion_tokens = np.concatenate([part.completion_tokens for part in parts])
        self.sequences = np.concatenate([part.sequences for part in parts])
        self.edges = np.concatenate([part.edges for part in parts])
        self.counted_edges = np.concatenate([part.counted_edges for part in parts])
        self.labelled = np.concatenate([part.labelled for part in parts])
        self.reference: ReferenceLogps | None = None  # of a stream there is none

    def __getitem__(self, index: int) -> TokenGroup:
        place = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[place]
        return part[int(index) - (int(self._ends[place]) - len(part.lengths))]

    def shapes(self, indices: np.ndarray) -> Shapes:
        places = np.searchsorted(self._ends, indices, side="right")
        firsts = self._ends - [len(part.lengths) for part in self._parts]
        found = [part.shapes(indices[places == i] - firsts[i]) for i, part in enumerate(self._parts)]
        return joined(found).at(np.argsort(np.argsort(places, kind="stable")))
