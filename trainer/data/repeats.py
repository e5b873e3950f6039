"""Examples that repeat or contradict one another, found by their claims (`formats.oddities.claims_of`)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NONE = -1


class Repeats(NamedTuple):
    """For each of n examples the number of an other one, or NONE."""

    repeated: np.ndarray  # (n,) an earlier example with one of its claims, if earlier ones have all of them
    contradicted: np.ndarray  # (n,) an example that claims the opposite


def find_repeats(
    claims: np.ndarray,  # (C,) int64
    makers: np.ndarray,  # (C,) the example that makes each claim, in ascending order
    count: int,
) -> Repeats:
    """Find which of `count` examples repeat or contradict others. An example without claims does neither."""
    known, first, which = np.unique(claims, return_index=True, return_inverse=True)
    first_makers = makers[first]  # (K,)
    earlier = np.where(first_makers[which] < makers, first_makers[which], NONE)
    place = np.searchsorted(known, known ^ 1)
    is_denied = known[np.minimum(place, len(known) - 1)] == known ^ 1
    deniers = np.full(len(known), NONE)
    deniers[is_denied] = first_makers[place[is_denied]]
    # Of several claims: the least repeated one decides, NONE if it is new; one denial is enough.
    repeated, contradicted = np.full(count, count), np.full(count, NONE)
    np.minimum.at(repeated, makers, earlier)
    np.maximum.at(contradicted, makers, deniers[which])
    return Repeats(np.where(repeated == count, NONE, repeated), contradicted)


MOST_CLAIMS = 1 << 24
"""The number of claims that are kept: 128 MiB."""


class KnownClaims:
    """The claims of tables that are gone, the first MOST_CLAIMS of them."""

    def __init__(self, most: int = MOST_CLAIMS) -> None:
        self._room = most
        self._runs: list[np.ndarray] = []  # each sorted, and longer than the next: 2^k tables make k runs

    def add(self, claims: np.ndarray) -> int:  # (C,)
        """Keep those of the claims that are new. Returns the number of new ones that there is no room for."""
        new = np.unique(claims[~self.holds(claims)])
        kept = new[: self._room]
        self._room -= len(kept)
        without_room = len(new) - len(kept)
        while self._runs and len(self._runs[-1]) <= len(kept):
            kept = np.union1d(self._runs.pop(), kept)
        if len(kept):
            self._runs.append(kept)
        return without_room

    def holds(self, claims: np.ndarray) -> np.ndarray:  # (C,)
        """(C,) which of these claims are known."""
        found = np.zeros(len(claims), bool)
        for run in self._runs:
            found |= run[np.minimum(np.searchsorted(run, claims), len(run) - 1)] == claims
        return found
