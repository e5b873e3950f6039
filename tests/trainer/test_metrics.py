"""The meter: means, extrema and correlations over ranks, of all values or of some."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import random_groups, run_ranks

from madpo.trainer.batches.packing import dummy_batch, pack
from madpo.trainer.metrics import Meter, MetricsFile, add_stats


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
        meter.add("rewards/chosen", values, taken)
        meter.add("rewards/rejected", values, ~taken)
        meter.add_correlation("correlation", values, 3 * values + other, taken)
        meter.add_correlation("constant", values, torch.ones_like(values), taken)
    return meter.reduce()


@pytest.mark.ranks
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
    assert first["rewards/margins"] == pytest.approx(some.mean() - x[~taken].mean())
    assert first.keys() == {"all", "some", "correlation"} | {
        *(f"madpo/weight_{x}" for x in ("mean", "min", "max")),
        *(f"rewards/{x}" for x in ("chosen", "rejected", "margins")),
    }


def of_the_model(shard) -> dict[str, float]:
    """One rank has two micro-batches, the other dummy batches, as with fewer groups than ranks."""
    meter = Meter()
    for seed in (1, 2):
        batch = dummy_batch() if shard.rank else pack(random_groups(1, seed=seed))
        value = torch.tensor(99.0 if shard.rank else float(seed))
        add_stats(meter, batch, {"router/aux_loss": value})
    meter.add("every", torch.tensor([1.0 + shard.rank]))
    meter.add_count("every", 2 if shard.rank else -1)
    found = meter.reduce()
    meter.add("every", torch.tensor([5.0]))  # of the next line alone
    return found | {"next": meter.reduce()["every"]}


@pytest.mark.ranks
def test_what_a_model_measures_is_a_mean_over_the_tokens_of_groups_and_not_of_dummies():
    first, second = run_ranks(2, of_the_model)
    assert first == second
    tokens = [len(pack(random_groups(1, seed=seed)).input_ids) for seed in (1, 2)]
    assert first["router/aux_loss"] == pytest.approx((tokens[0] + 2 * tokens[1]) / sum(tokens))
    assert first["every"] == pytest.approx((1 + 2) / (1 + 1 + 2 - 1)) and first["next"] == 5.0


def test_lines_of_steps_that_are_done_again_are_taken_out(tmp_path):
    """Lines up to the step resumed from stay; half a line at the end goes."""
    path = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": {step}.5}}\n' for step in (1, 3, 3, 4)]
    path.write_text("".join(lines) + '{"step": 2, "lo')
    file = MetricsFile(tmp_path, 3)
    assert path.read_text() == "".join(lines[:3])
    file.write({"step": 4, "loss": 0.25})
    assert path.read_text() == "".join(lines[:3]) + '{"step": 4, "loss": 0.25}\n'  # before it is closed
    file.close()
    MetricsFile(tmp_path, 0).close()
    assert path.read_text() == "" and [x.name for x in tmp_path.iterdir()] == [path.name]
