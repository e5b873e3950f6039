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

from madpo.kernels.token_logps import linear_token_logps
from madpo.trainer import dist

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def call(shard, name: str, *arguments: Any) -> Any:
    """The result of an example's `main`, in a process of its own that has joined a group."""
    return import_module(name).main(*arguments)


def call_alone(shard, names: list[str], folder: Path) -> list[Any]:
    """The results of several examples' `main`, in one process without a launcher."""
    dist.leave()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return [import_module(name).main(folder / name) for name in names]


@pytest.mark.ranks
def test_training_from_python_praises_more_and_a_custom_objective_learns(tmp_path):
    ((before, after), losses), *_ = run_ranks(
        1, call_alone, ["train_from_python", "custom_objective"], tmp_path
    )
    assert 0.2 < before < 0.8 < 0.9 < after
    assert losses[-1] < 0.6 * losses[0]


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
    engine, *_ = deepspeed.initialize(
        model=policy,
        model_parameters=[x for x in policy.parameters() if x.requires_grad],
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
def test_it_runs_under_torchrun_as_its_page_says():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(EXAMPLES / "head_in_a_plain_loop.py")],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stderr
    assert "largest difference of a weight" in done.stdout
