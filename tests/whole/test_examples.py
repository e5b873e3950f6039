"""The examples of Python, run for real: they train, and equal plain torch where they compare with it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks

import madpo
from madpo.kernels.token_logps import linear_token_logps
from madpo.trainer import dist
from madpo.trainer.errors import UserError
from madpo.trainer.objectives import EdgeScores, build
from madpo.trainer.objectives.registry import OBJECTIVES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def call(shard, name: str, *arguments: Any) -> Any:
    """The result of an example's `main`, in a process of its own that has joined a group."""
    return import_module(name).main(*arguments)


def call_alone(shard, name: str, *arguments: Any) -> Any:
    """The same, in a process without a launcher."""
    dist.leave()
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)
    return call(shard, name, *arguments)


def run_as_a_script(*command: str) -> str:
    """What `python` with these arguments prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ranks
def test_training_from_python_praises_more(tmp_path):
    ((before, after),) = run_ranks(1, call_alone, "train_from_python", tmp_path)
    assert 0.2 < before < 0.8 < 0.9 < after


@pytest.mark.slow
def test_a_custom_objective_learns():
    """In a Python of its own: here, configs have been read before it could register its objective."""
    printed = run_as_a_script(str(EXAMPLES / "custom_objective.py")).splitlines()
    by_hand = 0.31326 * 0.26894**2  # -log sigmoid(1), times sigmoid(-1) squared
    assert f"one pair by hand: {by_hand:.4f}" in printed
    losses = [float(loss) for loss in printed[-1].removeprefix("loss: ").split(", ")]
    assert losses[-1] < 0.8 * losses[0]


def test_a_custom_objective_is_known_by_name_and_one_that_comes_too_late_for_configs_is_told_so():
    module = import_module("custom_objective")
    try:
        one_pair = EdgeScores(*torch.tensor([[-1.0], [-3.0], [-2.0], [-2.0]]))
        loss = build("softened", beta=0.5, power=2.0)(one_pair)
        assert loss.item() == pytest.approx(0.313262 * 0.268941**2, rel=1e-5)
        with pytest.raises(UserError, match="'softened' was registered after the first config had been read"):
            madpo.load_config(module.config(Path("x"), "y", Path("z"), objective={"loss_type": "softened"}))
    finally:
        del OBJECTIVES["softened"]


@pytest.mark.ranks
def test_the_head_in_a_stock_trainer_equals_plain_torch(tmp_path):
    (steps,) = run_ranks(1, call, "head_in_trainer", tmp_path)
    assert len(steps) == 6 and len({round(ours, 4) for ours, _ in steps}) > 3
    for ours, plain in steps:
        assert abs(ours - plain) < 2e-6


@pytest.mark.ranks
@pytest.mark.parametrize("arguments", [(), ("--ddp",)], ids=["fsdp2", "ddp"])
def test_the_head_in_a_plain_loop_equals_plain_torch(arguments):
    for apart in run_ranks(2, call, "head_in_a_plain_loop", arguments):
        assert apart["loss"] < 2e-6 and apart["weight"] < 1e-5


def under_zero3(shard) -> list[tuple[float, float, str]]:
    """For each step: the ranks' mean loss, plain torch's, and what a call outside the forward says."""
    import deepspeed
    from head_in_a_plain_loop import PAIRS, STEPS, PolicyWithLoss
    from head_in_trainer import VOCABULARY, collate, plain_loss, random_pairs
    from tiny_model import random_llama

    plain, reference = (random_llama(VOCABULARY) for _ in range(2))
    policy = PolicyWithLoss(random_llama(VOCABULARY), random_llama(VOCABULARY))
    trained: Any = [x for x in policy.parameters() if x.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=policy,
        model_parameters=trained,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "optimizer": {"type": "SGD", "params": {"lr": 0.3}},
            "zero_allow_untested_optimizer": True,
        },
    )
    optimizer, out = torch.optim.SGD(plain.parameters(), lr=0.3), []
    for step in range(STEPS):
        pairs = random_pairs(PAIRS * 2, seed=step)
        own = collate(pairs[shard.rank * PAIRS : (shard.rank + 1) * PAIRS])
        loss, expected = engine(own), plain_loss(plain, reference, collate(pairs))
        engine.backward(loss)
        expected.backward()
        engine.step()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        with pytest.raises(ValueError) as refused:
            linear_token_logps(torch.zeros(1, 64), policy.policy.lm_head.weight, torch.zeros(1).long())
        out.append((mean.item() / 2, expected.item(), str(refused.value)))
    return out


@pytest.mark.ranks
def test_the_form_of_the_plain_loop_is_right_under_zero3_too():
    for ours, plain, refused in run_ranks(2, under_zero3)[0]:
        assert abs(ours - plain) < 2e-6
        assert "ZeRO-3 has shared it out" in refused and "inside the forward" in refused


@pytest.mark.slow
@pytest.mark.launcher
def test_the_plain_loop_runs_under_torchrun():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run_as_a_script(*launcher, str(EXAMPLES / "head_in_a_plain_loop.py"))
    assert "largest difference of a weight" in printed
