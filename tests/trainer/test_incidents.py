"""Which steps stand out, and what is written of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks

from madpo.trainer import incidents
from madpo.trainer.agreement import Agreement, Told
from madpo.trainer.incidents import FEWEST, SPIKE, Incidents


def rows(*numbers: int) -> Callable[[], np.ndarray]:
    return lambda: np.array(numbers)


ONE = torch.tensor([1.0, 1.0])
"""The sum and count of one loss of 1."""


def written(folder) -> list[dict[str, Any]]:
    path = folder / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_gradient_of_many_times_the_median_is_written_down_with_its_rows(tmp_path):
    seen = Incidents(tmp_path, is_main=True)
    for step in range(1, FEWEST + 1):
        seen.look_at(step, rows(step), torch.tensor(2.0), ONE)
    seen.look_at(FEWEST + 1, rows(7, 8), torch.tensor(2.0 * SPIKE * 1.01), ONE)
    assert written(tmp_path) == [], "looked at one step late"
    seen.look_at(FEWEST + 2, rows(9), 2.0 * SPIKE * 0.99, ONE)
    (first,) = written(tmp_path)
    assert (first["kind"], first["step"], first["rows"]) == ("gradient spike", FEWEST + 1, [7, 8])
    assert (first["grad_norm"], first["median"]) == (pytest.approx(20.2), 2.0)
    seen.close()
    assert len(written(tmp_path)) == 1


@pytest.fixture(autouse=True)
def alone(request, monkeypatch):
    """No other rank: what ranks say is what this one says."""
    if request.node.get_closest_marker("ranks"):
        return
    monkeypatch.setattr(incidents, "gathered", lambda said: [said])


def test_the_last_step_is_looked_at_when_the_run_ends(tmp_path):
    seen = Incidents(tmp_path, is_main=True)
    for step in range(1, FEWEST + 1):
        seen.look_at(step, rows(step), 1.0, ONE)
    seen.look_at(FEWEST + 1, rows(3), 1e6, ONE)
    seen.close()
    seen.close()
    assert [each["rows"] for each in written(tmp_path)] == [[3]]


def test_the_first_steps_are_too_few_to_tell(tmp_path):
    seen = Incidents(tmp_path, is_main=True)
    for step, norm in enumerate([1.0] * (FEWEST - 1) + [1e9]):
        seen.look_at(step, rows(step), norm, ONE)
    seen.close()
    assert written(tmp_path) == []


def test_a_skipped_step_is_written_with_the_losses_of_all_ranks(tmp_path, monkeypatch):
    """JSON has no NaN, so it is a text."""
    monkeypatch.setattr(incidents, "gathered", lambda loss: [0.5, loss])
    for is_main in (True, False):
        Incidents(tmp_path, is_main).skipped(3, rows(1, 2), torch.tensor([math.nan, 4.0]), 1)
    (only,) = written(tmp_path)
    assert (only["loss_of_ranks"], only["in_a_row"], only["rows"]) == ([0.5, "nan"], 1, [1, 2])


def losses(*values: float) -> Iterator[torch.Tensor]:
    """Sums and counts (2,) of three losses each."""
    return (torch.tensor([3 * value, 3.0]) for value in values)


USUAL = [0.6, 0.7] * (FEWEST // 2)
"""Their median is 0.65, and half of them are no more than 0.05 away from it."""


@pytest.mark.parametrize(
    ("loss", "is_odd"), [(0.65 + 0.05 * SPIKE * 1.01, True), (0.65 + 0.05 * SPIKE * 0.99, False)]
)
def test_a_loss_far_above_those_before_is_written_down_once_all_ranks_know(tmp_path, loss, is_odd):
    seen = Incidents(tmp_path, is_main=True)
    for step, each in enumerate(losses(*USUAL, loss), start=1):
        seen.look_at(step, rows(step), 1.0, each)
        assert not seen.is_odd
    seen.look_at(FEWEST + 2, rows(99), 1.0, ONE)
    assert seen.is_odd is is_odd and not written(tmp_path)
    seen.write_odd()
    (only,) = written(tmp_path)
    assert (only["kind"], only["step"], only["rows"]) == ("loss spike", FEWEST + 1, [FEWEST + 1])
    assert (only["loss_of_ranks"], only["median_of_ranks"]) == ([pytest.approx(loss)], [pytest.approx(0.65)])
    assert not seen.is_odd, "said once"


def two_ranks(shard, folder: Path) -> None:
    """The second rank's loss stands out; the step goes through the agreement as in the loop."""
    agreement, seen = Agreement(), Incidents(folder, shard.is_main)
    for step, each in enumerate(losses(*USUAL, 9.0 * shard.rank, 0.6), start=1):
        seen.look_at(step, rows(step, 10 * step), 1.0, each)
        if agreement.on(Told(odd=seen.is_odd)).odd:
            seen.write_odd()
    agreement.close()


@pytest.mark.ranks
def test_a_loss_that_stands_out_on_one_rank_is_written_with_the_losses_of_all(tmp_path):
    run_ranks(2, two_ranks, tmp_path)
    (only,) = written(tmp_path)
    assert (only["step"], only["rows"]) == (FEWEST + 1, [FEWEST + 1, 10 * (FEWEST + 1)])
    assert only["loss_of_ranks"] == [0.0, 9.0]


def test_a_loss_of_the_last_step_is_looked_at_when_the_run_ends(tmp_path):
    seen = Incidents(tmp_path, is_main=True)
    for step, each in enumerate(losses(*USUAL, 5.0), start=1):
        seen.look_at(step, rows(step), 1.0, each)
    seen.close()
    assert [each["kind"] for each in written(tmp_path)] == ["loss spike"]


def test_losses_that_are_nearly_alike_have_no_spike_in_their_last_digits(tmp_path):
    """Before training all are ln 2 but for rounding. A rank without an item of the step has no loss."""
    seen = Incidents(tmp_path, is_main=True)
    for step, each in enumerate(losses(*[0.6931] * FEWEST, 0.6932, 0.75), start=1):
        seen.look_at(step, rows(step), 1.0, each)
        seen.look_at(step, rows(step), 1.0, torch.zeros(2))
    seen.close()
    assert written(tmp_path) == []
