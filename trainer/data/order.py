"""The order of groups: a pure function of (seed, epoch, consumed), equal for any world size."""

from __future__ import annotations

import functools

import numpy as np


class DataOrder:
    """An endless sequence of group indices: in every epoch a new permutation of `num_groups` groups.

    Position p of the sequence is group `permutation(seed, p // num_groups)[p % num_groups]`, so a run resumes
    from the number of groups consumed. With `ease` (G,) every epoch goes from easy to hard: by falling ease,
    and shuffled among groups that are equally easy. With `weights` (G,) an epoch is G draws of groups in
    proportion to them, shuffled.
    """

    def __init__(
        self,
        num_groups: int,
        seed: int,
        ease: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        assert num_groups > 0 and (ease is None or len(ease) == num_groups)
        assert weights is None or (ease is None and len(weights) == num_groups)
        self.num_groups, self._seed, self._ease, self._weights = num_groups, seed, ease, weights
        self._cached_order = functools.lru_cache(maxsize=2)(self._order_of_epoch)

    def take(self, consumed: int, count: int) -> np.ndarray:
        """The group indices at positions consumed .. consumed + count - 1, (count,) int64."""
        positions = np.arange(consumed, consumed + count)
        epochs, offsets = np.divmod(positions, self.num_groups)
        indices = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            indices[in_epoch] = self._cached_order(int(epoch))[offsets[in_epoch]]
        return indices

    def _order_of_epoch(self, epoch: int) -> np.ndarray:
        order = permutation(self.num_groups, self._seed, epoch)
        if self._weights is not None:
            order = systematic_draws(self._weights, self._seed, epoch)[order]
        elif self._ease is not None:
            order = order[np.argsort(-self._ease[order], kind="stable")]
        return order.astype(np.min_scalar_type(self.num_groups))  # every rank of a machine holds one


def permutation(num_groups: int, seed: int, epoch: int) -> np.ndarray:
    """(G,) a random permutation that no numpy version changes.

    It sorts raw Philox words: numpy keeps a bit generator's stream fixed, and not its `permutation`.
    """
    words = np.random.Philox(key=[seed, epoch]).random_raw(num_groups)
    return np.argsort(words, kind="stable")


def systematic_draws(
    weights: np.ndarray,  # (G,) not negative, one of them positive
    seed: int,
    epoch: int,
) -> np.ndarray:
    """(G,) group indices in rising order. Group i appears G w_i / sum(w) times on average, always that number
    rounded up or down.

    Systematic sampling: one random number shifts G evenly spaced points over the weights laid end to end.
    Independent draws have this expectation too, with a larger variance.
    """
    # Another counter, so that the number is independent of the permutation's.
    word = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 2]).random_raw(1)
    shift = (word >> np.uint64(11)).astype(np.float64) * 2.0**-53
    ends = np.cumsum(weights, dtype=np.float64)
    points = (np.arange(len(weights)) + shift) * (ends[-1] / len(weights))
    # Rounding may put the last point onto the end, behind all weights.
    return np.minimum(np.searchsorted(ends, points, side="right"), np.flatnonzero(weights)[-1])
