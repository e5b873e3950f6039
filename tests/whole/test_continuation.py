"""Runs that are continued after everything that may change did, and from checkpoints that lost something."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import make_config, run_ranks, save_model, write_pairs
from small_runs import cut_back

from madpo.trainer.config.schema import Config
from madpo.trainer.stages.train import run_training

pytestmark = pytest.mark.ranks


def records(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def train(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")


def problems(shard, configs: list[Config]) -> list[str]:
    """What each of the runs is refused for, one after another; empty: it was not."""
    out = []
    for config in configs:
        try:
            train(shard, config)
            out.append("")
        except Exception as error:
            out.append(f"{type(error).__name__}: {error}")
    return out


def tree_of(folder: Path, tokenizer: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "whole"),
        "model": {"model_name_or_path": str(save_model(folder / "start", tokenizer, seed=1))},
        "data": {
            "dataset_name": str(write_pairs(folder / "pairs" / "train.jsonl", 21).parent),
            "dataset_test_split": "test",
            "cache_dir": str(folder / "cache"),
        },
        "objective": {"loss_type": "madpo", "tau": 2.0},
        "optim": {"lr": 3e-3},
        "train": {"max_steps": 3, "save_steps": 2, "micro_batch_tokens": 512, "export": False},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer_folder) -> tuple[Path, dict[str, Any]]:
    """A finished run of three steps, which has a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("runs")
    write_pairs(folder / "pairs" / "test.jsonl", 5, seed=9)
    tree = tree_of(folder, tokenizer_folder)
    run_ranks(1, train, make_config(folder, tree))
    return folder, tree


def cut(folder: Path, name: str) -> Path:
    """A copy of the run as it was when it had taken two steps."""
    run = folder / name
    shutil.copytree(folder / "whole", run)
    cut_back(run, 2)
    return run


def test_a_continuation_after_all_that_may_change_takes_the_step_that_the_run_took(whole):
    """All of it at once: how a result is come by, where things lie, what is logged, kept and judged."""
    folder, tree = whole
    (folder / "elsewhere").mkdir()
    shutil.copy(folder / "pairs" / "train.jsonl", folder / "elsewhere" / "moved.jsonl")
    changes: dict[str, dict[str, Any]] = {
        "model": {
            "attention": "sdpa",
            "prefix_sharing": False,
            "gradient_checkpointing": True,
            "activation_offloading": True,
        },
        "data": {
            "dataset_name": str(folder / "elsewhere" / "moved.jsonl"),
            "dataset_test_split": None,
            "on_bad_row": "drop",
            "cache_dir": str(folder / "other-cache"),
        },
        "train": {
            "micro_batch_tokens": 128,
            "head_gib": 1e-4,
            "head_impl": "torch",
            "logging_steps": 7,
            "save_steps": 1,
            "save_total_limit": 1,
            "max_shard_size": "1MB",
            "peak_tflops": 1.0,
        },
        "launch": {"timeout_minutes": 3.0, "num_processes": 1},
        "generate": {"num_completions": 3},
        "annotate": {"folds": 2},
        "deepspeed": {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000}},
    }
    run = cut(folder, "changed")
    other = {**tree, **{name: {**tree.get(name, {}), **values} for name, values in changes.items()}}
    config = make_config(folder, {**other, "output_dir": str(run)})
    run_ranks(1, train, config)
    want, got = records(make_config(folder, tree)), records(config)
    assert [line["step"] for line in got] == [1, 2, 3] and got[:2] == want[:2]
    assert got[2]["loss"] == pytest.approx(want[2]["loss"], rel=1e-5)
    assert got[2]["grad_norm"] == pytest.approx(want[2]["grad_norm"], rel=1e-4)
    assert got[2]["learning_rate"] == want[2]["learning_rate"]
    assert got[2]["num_tokens"] > want[2]["num_tokens"]  # prompts are computed for each completion now
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000003"]


@pytest.mark.xfail(
    strict=True, reason="DeepSpeed 0.19 raises errors of its own before it says that there is nothing to load"
)
def test_a_checkpoint_that_lost_its_shards_cannot_be_loaded(whole):
    """All of them, or the half that has the weights or the optimiser."""
    folder, tree = whole
    patterns = {"all": "*.pt", "weights": "*model_states.pt", "optimiser": "*optim_states.pt"}
    configs = []
    for name, pattern in patterns.items():
        run = cut(folder, f"without-{name}")
        lost = list((run / "checkpoints" / "step-00000002").glob(pattern))
        assert lost
        for path in lost:
            path.unlink()
        configs.append(make_config(folder, {**tree, "output_dir": str(run)}))
    (found,) = run_ranks(1, problems, configs)
    assert all("the checkpoint cannot be loaded" in problem for problem in found), found
