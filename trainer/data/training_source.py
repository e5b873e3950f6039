"""What training takes its groups from: a whole data set in some order. A stream is another (stream.py)."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import numpy as np

from madpo.trainer.data.groups import TokenDataset, TokenGroups
from madpo.trainer.data.order import DataOrder


class TrainingSource(Protocol):
    """An endless sequence of groups, the same on every rank, for any number of ranks and whenever asked:
    the number of groups consumed is all there is to resume from."""

    content: str  # what a continuation must find again
    num_groups: int | None  # of an epoch; None: not known before its end

    def take(self, consumed: int, count: int) -> tuple[TokenGroups, np.ndarray]:
        """The groups at positions consumed .. consumed + count - 1: (count,) indices into some groups.

        Raises UserError if they cannot be read or do not serve the objective.
        """
        ...

    def epoch(self, consumed: int) -> float:
        """How often the groups have been gone through."""
        ...

    def report(self) -> dict[str, Any]:
        """split -> what was read, cut and dropped so far."""
        ...


def content_of(groups: TokenDataset) -> str:
    """What a continuation of a run on these groups must find again."""
    return f"{len(groups)} groups, {groups.fingerprint}"


class DatasetSource:
    """A data set that is known as a whole, in the order of `data.order`, or drawn by weights (G,)."""

    def __init__(
        self,
        groups: TokenDataset,
        seed: int,
        order: str,
        report: dict[str, Any],
        weights: np.ndarray | None = None,
    ) -> None:
        self.content = content_of(groups)
        self.num_groups: int | None = len(groups)
        self._groups, self._report = groups, report
        self._order = DataOrder(len(groups), seed, groups.ease(order), weights)

    def seeing(self, groups: TokenDataset) -> DatasetSource:
        """The same order of the same groups, about which more is known."""
        out = copy.copy(self)
        out._groups = groups
        return out

    def take(self, consumed: int, count: int) -> tuple[TokenGroups, np.ndarray]:
        return self._groups, self._order.take(consumed, count)

    def epoch(self, consumed: int) -> float:
        return consumed / len(self._groups)

    def report(self) -> dict[str, Any]:
        return self._report
