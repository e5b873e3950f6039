"""The order of groups: a pure function of (seed, epoch, consumed), the same for any world size."""

from __future__ import annotations

import functools

import numpy as np


class DataOrder:
    """An endless sequence over `num_groups` groups, shuffled anew every epoch.

    Position p of the sequence is group `permutation(seed, p // num_groups)[p % num_groups]`, so the
    number of groups consumed is all there is to resume from.
    """

    def __init__(self, num_groups: int, seed: int) -> None:
        assert num_groups > 0
        self.num_groups = num_groups
        self._permutation = functools.lru_cache(maxsize=2)(
            lambda epoch: _permutation(num_groups, seed, epoch)
        )

    def take(self, consumed: int, count: int) -> np.ndarray:
        """The group indices at positions consumed .. consumed + count - 1, (count,) int64."""
        positions = np.arange(consumed, consumed + count)
        epochs, offsets = np.divmod(positions, self.num_groups)
        out = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._permutation(int(epoch))[offsets[here]]
        return out


def _permutation(num_groups: int, seed: int, epoch: int) -> np.ndarray:
    """Sorting raw Philox words: numpy keeps a bit generator's stream fixed across versions, which it
    does not promise for `permutation`."""
    words = np.random.Philox(key=[seed, epoch]).random_raw(num_groups)
    return np.argsort(words, kind="stable")
