"""The meter: means, extrema and correlations over ranks, of all values or of some."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import run_ranks

from madpo.trainer.metrics import Meter

pytestmark = pytest.mark.ranks


def halves(shard) -> dict[str, float]:
    """Each rank folds in its own six values, in micro-batches of four and two, of which some count."""
    random = np.random.default_rng(shard.rank)
    x, y, where = random.normal(size=6), random.normal(size=6), np.arange(6) % 3 > 0
    meter = Meter()
    for part in (slice(0, 4), slice(4, 6)):
        values, other, taken = (torch.from_numpy(z[part]) for z in (x, y, where))
        meter.add("all", values)
        meter.add("some", values, taken)
        meter.add("madpo/weight", values, taken)
        meter.add("none", values[:0])
        meter.add_correlation("correlation", values, 3 * values + other, taken)
        meter.add_correlation("constant", values, torch.ones_like(values), taken)
    return meter.reduce()


def test_values_of_two_ranks():
    first, second = run_ranks(2, halves)
    assert first == second
    randoms = [np.random.default_rng(rank) for rank in range(2)]
    x, y = np.concatenate([[r.normal(size=6), r.normal(size=6)] for r in randoms], axis=1)
    taken = np.tile(np.arange(6) % 3 > 0, 2)
    some = x[taken]
    assert first["all"] == pytest.approx(x.mean())
    assert first["some"] == first["madpo/weight_mean"] == pytest.approx(some.mean())
    assert (first["madpo/weight_min"], first["madpo/weight_max"]) == (some.min(), some.max())
    correlation = np.corrcoef(some, (3 * x + y)[taken])[0, 1]
    assert first["correlation"] == pytest.approx(correlation) and 0.5 < correlation < 1
    assert first.keys() == {"all", "some", "correlation"} | {
        f"madpo/weight_{x}" for x in ("mean", "min", "max")
    }
