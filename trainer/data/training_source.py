"""Training sources: what training takes groups from. A whole data set here, a stream in stream.py."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import numpy as np

from madpo.trainer.data.groups import TokenDataset, TokenGroups
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.report import Reports


class TrainingSource(Protocol):
    """An endless sequence of groups. It does not depend on the rank or on the number of ranks, and a run
    resumes from the number of groups consumed."""

    content: str  # fingerprint; a continuation must have the same
    num_groups: int | None  # in an epoch; None: not known before its end

    def take(self, consumed: int, count: int) -> tuple[TokenGroups, np.ndarray]:
        """The groups at positions consumed .. consumed + count - 1: token groups, and (count,) indices into
        them. Raises UserError if they cannot be read or do not serve the objective."""
        ...

    def epoch(self, consumed: int) -> float:
        """Passes over the groups after so many consumed."""
        ...

    def report(self) -> dict[str, Any]:
        """split -> what was read, cut and dropped so far."""
        ...


def content_of(groups: TokenDataset) -> str:
    """Fingerprint of the training data; a continued run must have the same."""
    return f"{len(groups)} groups, {groups.fingerprint}"


class DatasetSource:
    """A data set that is known as a whole, in the order of `data.order`, or drawn by `weights` (G,)."""

    def __init__(
        self,
        groups: TokenDataset,
        seed: int,
        order: str,
        report: Reports,
        weights: np.ndarray | None = None,
    ) -> None:
        self.content = content_of(groups)
        self.num_groups: int | None = len(groups)
        self._groups, self.report = groups, report
        self._order = DataOrder(len(groups), seed, groups.ease(order), weights)

    def seeing(self, groups: TokenDataset) -> DatasetSource:
        """A copy that reads from `groups`, these groups with cached log-probs, in the same order."""
        source = copy.copy(self)
        source._groups = groups
        return source

    def take(self, consumed: int, count: int) -> tuple[TokenGroups, np.ndarray]:
        return self._groups, self._order.take(consumed, count)

    def epoch(self, consumed: int) -> float:
        return consumed / len(self._groups)
