"""Evaluation without training."""

from __future__ import annotations

import json
from pathlib import Path

from harness import run_ranks
from small_runs import evaluate_only


def test_evaluation_of_the_start_gives_a_margin_of_zero(config):
    run_ranks(2, evaluate_only, config, True)
    record = json.loads((Path(config.output_dir) / "evaluation.json").read_text())
    assert record["eval_rewards/margins"] == 0.0 and record["eval_kl"] == 0.0
