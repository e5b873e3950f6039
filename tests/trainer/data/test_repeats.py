"""Repeated and contradicted examples, against two loops over all pairs of examples."""

from __future__ import annotations

import numpy as np

from madpo.trainer.data.repeats import NONE, KnownClaims, find_repeats


def test_repeats_are_those_of_two_loops():
    random = np.random.default_rng(0)
    for _ in range(200):
        counts = random.integers(0, 4, random.integers(1, 9))
        makers = np.repeat(np.arange(len(counts)), counts)
        claims = random.integers(0, 8, len(makers))
        own = [set(claims[makers == i].tolist()) for i in range(len(counts))]
        found = find_repeats(claims, makers, len(counts))
        for i, mine in enumerate(own):
            earlier = set().union(*own[:i])
            assert (found.repeated[i] != NONE) == (bool(mine) and mine <= earlier)
            assert found.repeated[i] == NONE or own[found.repeated[i]] & mine
            others = [j for j in range(len(own)) if any(claim ^ 1 in own[j] for claim in mine)]
            assert (found.contradicted[i] != NONE) == bool(others)
            assert found.contradicted[i] == NONE or found.contradicted[i] in others


def test_no_more_claims_are_kept_than_fit():
    known = KnownClaims(most=3)
    assert not known.holds(np.array([4])).any()
    assert known.add(np.array([6, 2, 2])) == 0
    assert known.add(np.array([8, 2, 4, 9])) == 2
    assert known.holds(np.array([2, 4, 6, 8, 9])).tolist() == [True, True, True, False, False]
    many = KnownClaims()
    claims = np.random.default_rng(0).integers(0, 10**6, (40, 50))
    assert sum(map(many.add, claims)) == 0 and many.holds(claims.ravel()).all()
    assert not many.holds(claims.ravel() + 10**6).any()
