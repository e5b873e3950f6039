"""What a reference thinks of groups, where it was scored before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ReferenceLogps:
    """Log-probs of all completion tokens, group after group."""

    flat: np.ndarray  # (M,) float32
    starts: np.ndarray  # (G + 1,) where each group's begin

    def __getitem__(self, index: int) -> np.ndarray:  # (m,)
        """Those of one group."""
        return self.flat[self.starts[index] : self.starts[index + 1]]
