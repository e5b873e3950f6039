"""What a mistake in a config is answered with, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from madpo.trainer.config.error_text import ON_POLICY
from madpo.trainer.config.schema import load
from madpo.trainer.objectives.build import build
from madpo.trainer.objectives.registry import OBJECTIVES

CONFIG = (
    "output_dir: o\nmodel: {model_name_or_path: m}\ndata: {dataset_name: d}\nobjective: {loss_type: madpo}\n"
)

MISTAKES = {
    "train.bf16=yes": "train.bf16: expected true or false, got 'yes'",
    "optim.lr=fast": "optim.lr: expected a number above 0, got 'fast'",
    "optim=fast": "optim: expected a section, got 'fast'",
    "peft=lora": "peft: expected a section or null, got 'lora'; peft={} trains an adapter",
    "model.freeze=head": "model.freeze: expected a list of texts, got 'head'",
    "model.freeze=[1]": "model.freeze: expected a list of texts, got 1",
    "data.columns=good": "data.columns: expected a mapping, got 'good'",
    "data.columns.chosen=1": "data.columns.chosen: expected text, got 1",
    "data.adapter=shargpt": "data.adapter: unknown adapter, did you mean 'sharegpt'? (got 'shargpt')",
    "data.datasets=[{path: a, fraction: 0}]": "data.datasets.0.fraction: expected a number above 0, got 0",
    "data.datasets=[]": "data.datasets: expected a list of one or more sections or null, got []",
    "train.max_shard_size=big": "train.max_shard_size: expected text, as in 5GB or 500MB, got 'big'",
    "peft.lora_r=0": "peft.lora_r: expected a whole number of at least 1 or null, got 0",
    "peft.lora_target_modules=3": "peft.lora_target_modules: expected all-linear, a list of texts or null, "
    "got 3",
    "objective.smoothing=1": "objective.smoothing: unknown key; known here: ablation, beta, c_max, c_min, "
    "lambda, loss_type, margin_scale, tau",
    "objective.loss_type=MADPOO": "objective.loss_type: unknown objective 'MADPOO', did you mean 'madpo'?",
    "objective={loss_type: dpop, lam: -1}": "objective.lam: expected a number of at least 0, got -1",
    "objective=3": "objective: expected a section, got 3",
    "generate.judge.reward_model=3": "generate.judge.reward_model: expected text or null, got 3",
    "seed=-1": "seed: expected a whole number of at least 0 and below 4294967296, got -1",
}


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(CONFIG)
    return file


def message_of(path: Path, override: str) -> str:
    with pytest.raises(ValueError) as caught:
        load(path, [override])
    return str(caught.value).removeprefix(f"{path} and the command line: ")


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_answered_in_these_words(path, override):
    assert message_of(path, override).splitlines() == [MISTAKES[override]]


def test_what_a_run_on_policy_would_need_is_said(path):
    assert not ON_POLICY & OBJECTIVES.keys()
    for name in (*ON_POLICY, "PPO"):
        assert message_of(path, f"objective.loss_type={name}") == (
            f"objective.loss_type: madpo has no on-policy RL, so no {name!r}; it trains on completions that "
            "are there: sample and judge them with madpo generate, then train with dpo or madpo, in rounds "
            "if you like"
        )


def test_an_unknown_objective_without_a_near_name_gets_the_list(path):
    message = message_of(path, "objective.loss_type=actor_critic")
    assert message.endswith(f"unknown objective 'actor_critic'; known here: {', '.join(sorted(OBJECTIVES))}")


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"bta": 1.0}, "madpo: bta: unknown parameter, did you mean 'beta'?"),
        ({"lambda": -1.0}, "madpo: lambda: expected a number above 0, got -1.0"),
        ({"beta": "x", "c_max": 1.0}, "madpo: beta: expected a number above 0, got 'x'; c_max: expected a"),
    ],
)
def test_outside_code_is_answered_in_the_same_words(parameters, message):
    with pytest.raises(ValueError) as caught:
        build("madpo", **parameters)
    assert str(caught.value).startswith(message)
