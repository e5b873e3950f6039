"""What a reference thinks of groups, where it was scored before."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from madpo.trainer.data.dataset import GroupDataset


@dataclass(frozen=True)
class ReferenceLogps:
    """Log-probs of all completion tokens, group after group."""

    flat: np.ndarray  # (M,) float32
    starts: np.ndarray  # (G + 1,) where each group's begin

    def __getitem__(self, index: int) -> np.ndarray:  # (m,)
        """Those of one group."""
        return self.flat[self.starts[index] : self.starts[index + 1]]


def with_logps(
    groups: GroupDataset,
    flat: np.ndarray,  # (M,) float32
) -> GroupDataset:
    """The same groups, with what the reference thinks of them."""
    starts = np.concatenate(([0], np.cumsum(groups.completion_tokens, dtype=np.int64)))
    assert len(flat) == starts[-1]
    out = copy.copy(groups)
    out.reference = ReferenceLogps(flat, starts)
    return out
