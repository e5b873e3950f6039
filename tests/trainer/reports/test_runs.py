"""Run folders read for a report: names, the sentence on what happened, differences by hand, warnings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from madpo.trainer.errors import UserError
from madpo.trainer.pair_margins import ACCURACY, MARGIN, PairMargins, StoredPairs, write_pairs
from madpo.trainer.reports.runs import (
    Run,
    data_warnings,
    difference,
    load_runs,
    short_names,
    what_happened,
)

ACC, MAR = f"eval_{ACCURACY}", f"eval_{MARGIN}"


def write_run(folder: Path, *records: dict[str, float], loss_type: str = "dpo", **files: Any) -> Path:
    """A run folder; `files`: contents of run.json and data_report.json."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(f"objective: {{loss_type: {loss_type}}}\n")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def evaluated(folder: Path, margins: list[float], data: str = "x", stored_step: int = 5) -> Run:
    """A run with one evaluation of these margins, at step 5."""
    pairs = PairMargins(np.array(margins), np.ones(len(margins), np.int64))
    means = {ACCURACY: float((pairs.margins > 0).mean()), MARGIN: float(pairs.margins.mean())}
    record = {f"eval_{name}": value for name, value in (means | pairs.metrics()).items()}
    write_run(folder, {"step": 5, "eval_loss": 0.5, **record})
    write_pairs(folder, StoredPairs(stored_step, data, pairs))
    return load_runs([folder])[0]


def test_names_are_as_short_as_they_can_be():
    assert short_names([Path("/r/dpo"), Path("/r/madpo")]) == ["dpo", "madpo"]
    assert short_names([Path("/x/a/run"), Path("/x/b/run"), Path("/x/other")]) == ["a/run", "b/run", "other"]
    assert short_names([Path("/run"), Path("/a/run")])[1] == "a/run"
    with pytest.raises(UserError, match=r"/r/a: named twice"):
        short_names([Path("/r/a"), Path("/r/b"), Path("/r/b/../a")])


def test_a_difference_pair_by_pair_by_hand(tmp_path):
    first = evaluated(tmp_path / "first", [1.0, -1.0, 2.0, -4.0])
    second = evaluated(tmp_path / "second", [2.0, 1.0, 2.0, -4.0])
    accuracy, margin = difference(first, second, ACCURACY), difference(first, second, MARGIN)
    assert accuracy is not None and margin is not None
    # Changes 0, 1, 0, 0 of the accuracy and 1, 2, 0, 0 of the margin.
    assert (accuracy.mean, accuracy.pairs) == (0.25, 4)
    assert accuracy.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    assert margin.mean == 0.75
    assert margin.standard_error == pytest.approx(math.sqrt((0.0625 + 1.5625 + 2 * 0.5625) / 4 / 4))


@pytest.mark.parametrize("change", [{"data": "y"}, {"stored_step": 4}], ids=["other data", "older file"])
def test_without_the_same_pairs_a_difference_is_unpaired(tmp_path, change):
    first = evaluated(tmp_path / "first", [1.0, -1.0, 2.0, -4.0])
    second = evaluated(tmp_path / "second", [2.0, 1.0, 2.0, -4.0], **change)
    found = difference(first, second, ACCURACY)
    assert found is not None and found.pairs is None and found.mean == 0.25
    assert found.standard_error == pytest.approx(math.sqrt(0.25 / 4 + 0.1875 / 4))


def test_runs_of_earlier_versions_have_a_difference_without_an_error(tmp_path):
    values = {"a": 0.5, "b": 0.75}
    folders = [write_run(tmp_path / x, {"step": 5, "eval_loss": 0.5, ACC: y}) for x, y in values.items()]
    runs = load_runs(folders)
    found = difference(runs[0], runs[1], ACCURACY)
    assert found is not None and (found.mean, found.standard_error, found.pairs) == (0.25, None, None)
    assert difference(runs[0], runs[1], MARGIN) is None


def test_what_happened_names_start_end_best_and_state(tmp_path):
    course = [0.5, 0.64, 0.62]
    records = [{"step": 10 * i, "eval_loss": 0.7 - i / 10, ACC: x, MAR: 1.0} for i, x in enumerate(course)]
    folder = write_run(tmp_path / "run", *records, {"step": 30, "loss": 0.4}, run={"total_steps": 40})
    told = "held-out accuracy 50.0% (step 0) → 62.0% at step 20 of 40 (best 64.0% at step 10); "
    told += "held-out loss 0.700 → 0.500"
    assert what_happened(load_runs([folder])[0]) == f"{told}; stopped at step 30 of 40"
    with FileLock(folder / ".lock"):
        assert what_happened(load_runs([folder])[0]) == f"{told}; running at step 30 of 40"


def test_an_accuracy_that_only_counts_ties_is_left_out(tmp_path):
    start = {"step": 0, "eval_loss": 0.69, ACC: 0.0, MAR: 0.0}
    folder = write_run(tmp_path / "run", start, {"step": 5, "eval_loss": 0.6, ACC: 0.6, MAR: 0.1})
    run = load_runs([folder])[0]
    assert run.series(ACC) == [[5], [0.6]]
    assert what_happened(run) == "held-out accuracy 60.0% at step 5; held-out loss 0.690 → 0.600"


def test_supervised_training_has_a_perplexity(tmp_path):
    records = [{"step": step, "eval_loss": loss} for step, loss in ((1, 2.0), (2, 1.0))]
    run = load_runs([write_run(tmp_path / "run", *records, loss_type="nll")])[0]
    assert run.series("eval_perplexity")[1] == pytest.approx([math.e**2, math.e])
    assert what_happened(run).startswith("held-out perplexity 7.39 (step 1) → 2.72 at step 2")


def test_other_data_is_warned_of(tmp_path):
    reports = ({"train": {"rows": 8, "tokens": 90}}, {"train": {"rows": 8, "tokens": 91}})
    runs = load_runs(
        [
            write_run(tmp_path / str(number), {"step": 1, "loss": 1.0}, data_report=report)
            for number, report in enumerate((reports[0], reports[0], reports[1]))
        ]
    )
    assert data_warnings(runs[:2]) == []
    expected = "2 and 0 have different data (train: 8 rows, 90 tokens against 8 rows, 91 tokens)."
    assert data_warnings(runs) == [expected]
    pairs = [evaluated(tmp_path / name, [1.0, 2.0], data=name) for name in ("x", "y")]
    assert "y and x were evaluated on different held-out pairs" in data_warnings(pairs)[0]
