"""What groups have several of each (completions, edges), in one array, one group after another."""

from __future__ import annotations

import numpy as np


def ranges(
    counts: np.ndarray,  # (G,) of things that stand one group after another
    selected: np.ndarray,  # (n,) groups
) -> np.ndarray:
    """The places of all things of the selected groups, in their order."""
    taken = counts[selected]
    firsts = (np.cumsum(counts) - counts)[selected]
    return np.arange(taken.sum()) + np.repeat(firsts - (np.cumsum(taken) - taken), taken)


def sums(
    values: np.ndarray,  # (E,) of things that stand one group after another
    counts: np.ndarray,  # (G,) of them, none 0
) -> np.ndarray:
    """(G,) sums over each group's."""
    return np.add.reduceat(values, np.cumsum(counts) - counts)
