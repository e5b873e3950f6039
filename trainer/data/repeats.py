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
        self._most, self._known = most, np.empty(0, np.int64)

    def add(self, claims: np.ndarray) -> None:  # (C,)
        room = self._most - len(self._known)
        self._known = np.union1d(self._known, np.unique(claims)[: max(room, 0)])

    def holds(self, claims: np.ndarray) -> np.ndarray:  # (C,)
        """(C,) which of these claims are known."""
        if not len(self._known):
            return np.zeros(len(claims), bool)
        return self._known[np.minimum(np.searchsorted(self._known, claims), len(self._known) - 1)] == claims
