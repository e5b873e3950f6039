"""Ragged arrays: values of completions or edges, flat, one group after another."""

from __future__ import annotations

import numpy as np


def ranges(
    counts: np.ndarray,  # (G,) values of each group
    selected: np.ndarray,  # (n,) groups
) -> np.ndarray:
    """The positions, in the flat array, of all values of the selected groups, in the order selected."""
    taken = counts[selected]
    firsts = (np.cumsum(counts) - counts)[selected]
    return np.arange(taken.sum()) + np.repeat(firsts - (np.cumsum(taken) - taken), taken)


def sums(
    values: np.ndarray,  # (E,)
    counts: np.ndarray,  # (G,) values of each group, none 0
) -> np.ndarray:
    """(G,) the sum over each group's values."""
    return np.add.reduceat(values, np.cumsum(counts) - counts)
