"""Which steps stand out, and what is written of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from madpo.trainer import incidents
from madpo.trainer.incidents import FEWEST, SPIKE, Incidents


def rows(*numbers: int) -> Callable[[], np.ndarray]:
    return lambda: np.array(numbers)


def written(folder) -> list[dict[str, Any]]:
    path = folder / "incidents.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_gradient_of_many_times_the_median_is_written_down_with_its_rows(tmp_path):
    seen = Incidents(tmp_path, is_main=True)
    for step in range(1, FEWEST + 1):
        seen.look_at(step, rows(step), torch.tensor(2.0))
    seen.look_at(FEWEST + 1, rows(7, 8), torch.tensor(2.0 * SPIKE * 1.01))
    assert written(tmp_path) == [], "looked at one step late"
    seen.look_at(FEWEST + 2, rows(9), 2.0 * SPIKE * 0.99)
    (first,) = written(tmp_path)
    assert (first["kind"], first["step"], first["rows"]) == ("gradient spike", FEWEST + 1, [7, 8])
    assert (first["grad_norm"], first["median"]) == (pytest.approx(20.2), 2.0)
    seen.close()
    assert len(written(tmp_path)) == 1


def test_the_last_step_is_looked_at_when_the_run_ends(tmp_path):
    seen = Incidents(tmp_path, is_main=True)
    for step in range(1, FEWEST + 1):
        seen.look_at(step, rows(step), 1.0)
    seen.look_at(FEWEST + 1, rows(3), 1e6)
    seen.close()
    seen.close()
    assert [each["rows"] for each in written(tmp_path)] == [[3]]


def test_the_first_steps_are_too_few_to_tell(tmp_path):
    seen = Incidents(tmp_path, is_main=True)
    for step, norm in enumerate([1.0] * (FEWEST - 1) + [1e9]):
        seen.look_at(step, rows(step), norm)
    seen.close()
    assert written(tmp_path) == []


def test_a_skipped_step_is_written_with_the_losses_of_all_ranks(tmp_path, monkeypatch):
    """JSON has no NaN, so it is a text."""
    monkeypatch.setattr(incidents, "gathered", lambda loss: [0.5, loss])
    Incidents(tmp_path, is_main=True).skipped(3, rows(1, 2), math.nan, 1)
    Incidents(tmp_path, is_main=False).skipped(3, rows(1, 2), math.nan, 1)
    (only,) = written(tmp_path)
    assert (only["loss_of_ranks"], only["in_a_row"], only["rows"]) == ([0.5, "nan"], 1, [1, 2])
