"""Margins of held-out pairs: standard errors by hand, the order over ranks, the file."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks

from madpo.trainer.errors import UserError
from madpo.trainer.pair_margins import (
    PairCollector,
    PairMargins,
    StoredPairs,
    all_are_ties,
    read_pairs,
    standard_error,
    write_pairs,
)
from madpo.trainer.run_folder import last_evaluation

ONE_EACH = np.ones(4, np.int64)


def test_standard_errors_by_hand():
    """Without pairs in common it is the deviation over sqrt(n); pairs of a prompt count as one draw."""
    values = np.array([1.0, 2.0, 3.0, 6.0])
    deviation = math.sqrt((4 + 1 + 0 + 9) / 4)
    assert standard_error(values, ONE_EACH) == pytest.approx(deviation / 2)
    # Residuals -2 and -1 of the first prompt, 0 and 3 of the third; the second has lost its pairs.
    assert standard_error(values, np.array([2, 0, 2])) == pytest.approx(math.sqrt(9 + 9) / 4)
    assert standard_error(np.array([True, False, True, True]), ONE_EACH) == pytest.approx(
        math.sqrt(0.75 * 0.25 / 4)
    )


def test_all_are_ties_only_if_no_pair_is_ranked():
    ties = {"eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0}
    assert all_are_ties(ties, "eval_")
    assert not all_are_ties(ties | {"eval_rewards/margins": -0.1}, "eval_")
    assert not all_are_ties(ties | {"eval_rewards/accuracies": 0.5}, "eval_")


def collected(shard, copies: int) -> list[float]:
    """Two steps of three and two pairs; the ranks share them out, or hold the same ones."""
    collector = PairCollector(np.array([2, 1, 2]), torch.device("cpu"))
    for first, positions in ((0, [2, 0, 1]), (3, [1, 0])):
        own = positions if copies == 2 else positions[shard.rank :: 2]
        collector.add(torch.tensor(own), torch.tensor([10.0 * (first + place) for place in own]))
        step: Any = SimpleNamespace(num_edges=len(positions), copies=copies)
        collector.close_step(step)
    return collector.gather().margins.tolist()


@pytest.mark.ranks
@pytest.mark.parametrize("copies", [1, 2])
def test_margins_come_in_the_order_of_the_data_on_all_ranks(copies):
    assert run_ranks(2, collected, copies) == [[0.0, 10.0, 20.0, 30.0, 40.0]] * 2


@pytest.mark.ranks
def test_a_run_keeps_the_margins_that_its_evaluation_averaged(trained_once):
    folder = Path(trained_once.output_dir)
    stored, record = read_pairs(folder), last_evaluation(folder)
    assert stored is not None and stored.step == record["step"] == 1
    margins = stored.pairs.margins
    assert len(margins) == record["eval_num_pairs"] == 11
    assert margins.mean() == pytest.approx(record["eval_rewards/margins"], rel=1e-5)
    assert (margins > 0).mean() == pytest.approx(record["eval_rewards/accuracies"])
    assert margins.std() / math.sqrt(11) == pytest.approx(record["eval_rewards/margins_stderr"], rel=1e-5)


def test_the_file_gives_back_what_was_written(tmp_path):
    assert read_pairs(tmp_path) is None
    stored = StoredPairs(7, "data", PairMargins(np.array([0.5, -1.25, 2.0]), np.array([1, 0, 2])))
    write_pairs(tmp_path, stored)
    found = read_pairs(tmp_path)
    assert found is not None and (found.step, found.data) == (7, "data")
    assert found.pairs.margins.tolist() == [0.5, -1.25, 2.0]
    assert found.pairs.prompt_pairs.tolist() == [1, 0, 2]


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 1, "data": "x"}'])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "held_out_pairs.json").write_text(content)
    with pytest.raises(UserError, match=r"held_out_pairs\.json"):
        read_pairs(tmp_path)
