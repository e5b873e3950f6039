"""The sentiment experiment's recipe: every stage has a sound config, and a small run does what it must."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rated_archive
from patience import patient

from madpo.benchmarks.sentiment import text
from madpo.benchmarks.sentiment.evaluate import NAME, sample
from madpo.benchmarks.sentiment.results import estimate
from madpo.launch.recipes import read as recipe
from madpo.launch.recipes import runner

RECIPE = Path(__file__).resolve().parents[3] / "configs" / "sentiment.yaml"


def test_every_stage_of_the_recipe_has_a_sound_config(tmp_path, capsys):
    pytest.importorskip("vaderSentiment")
    overrides = [f"output_dir={tmp_path}"]
    assert runner.run(RECIPE, overrides, 1, [], dry_run=True) == 0
    stages = recipe.read(RECIPE, overrides).stages
    arms = {match["arm"] for stage in stages if (match := NAME.match(stage.name))}
    assert {"dpo", "ipo", "beta-dpo", "madpo", "mixdpo"} < arms
    for tier in ("high", "medium", "low"):
        seeds = [s.name for s in stages if s.name.startswith(f"madpo_b0.1_{tier}_")]
        assert len(seeds) == 5
    evaluation = next(stage for stage in stages if stage.name == "evaluation")
    assert set(evaluation.after) >= {stage.name for stage in stages if NAME.match(stage.name)}


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.timeout(patient(900))
def test_dpo_pleases_the_oracle_more_than_the_sft_model_does(tmp_path):
    """By three standard errors over the same held-out prompts, at a finite distance from it."""
    pytest.importorskip("vaderSentiment")
    rated_archive.place(tmp_path / "runs" / "text" / "download")
    overrides = [
        f"output_dir={tmp_path / 'runs'}",
        "vars.scale=0.2",
        "vars.seeds=[0]",
        "lm.train.num_train_epochs=2",
        "dpo_*.train.num_train_epochs=4",
    ]
    command = [sys.executable, "-m", "madpo.launch.cli", "run", str(RECIPE), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--only", "dpo_b0.1_low_0"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sentences = text.read_rated(tmp_path / "runs" / "text" / "download")
    held_out = text.deal(sentences, text.SHARES_OF_FEW)["evaluation"]
    prompts = [row["prompt"] for row in text.continuations(held_out, 7, negative=True)]
    sft, dpo = (tmp_path / "runs" / name / "model" for name in ("sft", "dpo_b0.1_low_0"))
    before, after = (sample(model, sft, prompts, max_new_tokens=40) for model in (sft, dpo))
    gain = estimate(np.array([after["rewards"]]) - np.array([before["rewards"]]))
    assert gain.mean > 3 * gain.error, gain
    assert np.abs(before["kls"]).max() < 1e-3
    assert 0 < np.mean(after["kls"]) < 100
