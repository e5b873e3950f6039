"""A GPU without memory left: what the message says, and that one rank says it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import run_ranks
from small_runs import changed

from madpo.launch import worker
from madpo.trainer.config import strict_yaml
from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.config.schema import Config, dump, from_tree
from madpo.trainer.out_of_memory import message, remedies
from madpo.trainer.stages import train as training

TORCH = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.53 GiB of which ..."
PLAIN = "deepspeed.zero_optimization.offload_"


@pytest.fixture
def run(tmp_path) -> Config:
    return Config.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"model_name_or_path": "some/model"},
            "data": {"dataset_name": "pairs", "max_length": 1024},
            "objective": {"loss_type": "dpo"},
        }
    )


def proposed(config: Config, task: str = "train", ranks: int = 8) -> list[str]:
    return [override for override, _ in remedies(config, task, ranks)]


def test_all_keys_are_proposed_in_order_and_each_is_one_that_could_be_set(run):
    names = [
        *("train.micro_batch_tokens=8192", "train.head_gib=1"),
        *("model.gradient_checkpointing=selective", "model.gradient_checkpointing=true"),
        *("model.reference=cached", "peft={}"),
        *(PLAIN + "optimizer={device: cpu}", PLAIN + "param={device: cpu}"),
        *("model.activation_offloading=true", "data.max_length=512"),
    ]
    assert proposed(run) == names
    for name in names:
        from_tree(strict_yaml.override(run.model_dump(by_alias=True), [name]), "the test")


def test_what_is_set_already_or_of_no_use_is_not_proposed(run):
    best = changed(
        run,
        model={"gradient_checkpointing": True, "activation_offloading": True, "reference": "cached"},
        train={"micro_batch_tokens": 2048, "head_gib": 0.25},
        deepspeed={"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    )
    assert proposed(best, ranks=1) == ["peft={}", "data.max_length=512"]
    adapted = run.model_copy(update={"peft": PeftConfig()})
    assert proposed(adapted)[4:5] == [PLAIN + "optimizer={device: cpu}"]  # no second model
    assert proposed(run, "evaluate")[2:] == [
        "model.reference=cached",
        PLAIN + "param={device: cpu}",
        "data.max_length=512",
    ]
    assert proposed(run, "generate") == ["generate.batch_size=32"]


def test_the_message_says_what_each_phase_left_and_which_keys_a_run_may_continue_with(run):
    left = {"load": 4.0, "start": 10.0, "forward_backward": 12.5}
    lines = message(TORCH, left, 21.0, 23.53, run, "train", 8).splitlines()
    assert lines[0].startswith("CUDA out of memory: 2.50 GiB more were asked for; torch holds 21.00 of ")
    assert [line.split(maxsplit=2) for line in lines[1:5]] == [
        ["4.00", "GiB", "weights"],
        ["6.00", "GiB", "optimiser"],
        ["2.50", "GiB", "gradients"],
        ["8.50", "GiB", "activations, logits and buffers"],
    ]
    assert lines[6] == "  train.micro_batch_tokens=8192  (smaller products)"
    (cached,) = [line for line in lines if "model.reference" in line]
    assert cached.endswith("; a new run, with --fresh (in Python: fresh=True))")
    assert "\n     21.00 GiB  all\n" in message(TORCH, {}, 21.0, 23.53, run, "train", 8)


def out_of_memory(shard, path: Path) -> int:
    """The worker's own function in a rank whose training raises what torch raises on a full GPU."""

    def run_training(config: Config, command: str, extend: bool) -> None:
        raise torch.OutOfMemoryError(TORCH)

    training.run_training = run_training
    return worker.main([str(path)])


@pytest.mark.ranks
def test_one_rank_says_it_and_the_log_has_it_of_all(run, tmp_path, capfd):
    path = tmp_path / "config.yaml"
    path.write_text(dump(run))
    assert run_ranks(2, out_of_memory, path) == [2, 2]
    assert capfd.readouterr().err.count("error: CUDA out of memory: 2.50 GiB more were asked for") == 1
    log = (Path(run.output_dir) / "log.txt").read_text()
    assert log.count("== ") == 1 and log.count("CUDA out of memory") == 2
    assert log.count("train.micro_batch_tokens=8192") == 2
