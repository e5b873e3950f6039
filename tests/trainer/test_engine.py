"""DeepSpeed's configuration from ours at odd values, and which parameters decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import make_config
from torch import nn

from madpo.trainer.config.schema import Config
from madpo.trainer.engine import deepspeed_config, parameter_groups


@pytest.fixture(autouse=True)
def _two_ranks(monkeypatch) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)


def config_of(tmp_path, **tree: Any) -> Config:
    return make_config(
        tmp_path, {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d.jsonl"}, **tree}
    )


def test_every_number_of_the_optimiser_reaches_deepspeed(tmp_path):
    optim = {
        "lr": 3e-4,
        "weight_decay": 0.07,
        "adam_beta1": 0.81,
        "adam_beta2": 0.93,
        "adam_epsilon": 3e-5,
        "max_grad_norm": 0.37,
    }
    config = deepspeed_config(config_of(tmp_path, optim=optim))
    assert config["optimizer"]["type"] == "AdamW"
    found = config["optimizer"]["params"]
    assert found["lr"] == 3e-4 and found["betas"] == [0.81, 0.93]
    assert found["eps"] == 3e-5 and found["weight_decay"] == 0.07
    assert found["torch_adam"] is True
    assert config["gradient_clipping"] == 0.37
    off = config_of(tmp_path, optim={"max_grad_norm": 0.0})
    assert deepspeed_config(off)["gradient_clipping"] == 0.0


@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_of_micro_batches_are_summed_in_float32(tmp_path, bf16):
    """Whatever the weights are in; and DeepSpeed divides by no number of its own."""
    config = deepspeed_config(config_of(tmp_path, train={"bf16": bf16}))
    assert config["bf16"] == {"enabled": bf16}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["gradient_accumulation_steps"] == config["train_micro_batch_size_per_gpu"] == 1


def test_the_users_block_has_the_last_word(tmp_path):
    block = {
        "data_types": {"grad_accum_dtype": "bf16"},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": False},
    }
    config = config_of(tmp_path)
    plain = deepspeed_config(config)["zero_optimization"]
    assert plain["stage"] == 3 and plain["contiguous_gradients"] is True and plain["overlap_comm"] is False
    found = deepspeed_config(config.model_copy(update={"deepspeed": block}))
    assert found["data_types"] == {"grad_accum_dtype": "bf16"}
    plain.pop("stage3_param_persistence_threshold")  # of the tests' own block, which is replaced
    assert found["zero_optimization"] == {**plain, **block["zero_optimization"]}


@pytest.mark.parametrize(("stage", "left"), [(3, 3), (2, 0), (1, 0)])
def test_without_training_there_is_no_optimiser_and_only_stage_3_has_something_to_part(tmp_path, stage, left):
    config = config_of(tmp_path, deepspeed={"zero_optimization": {"stage": stage}})
    assert deepspeed_config(config)["zero_optimization"]["stage"] == stage
    found = deepspeed_config(config, training=False)
    assert found["zero_optimization"]["stage"] == left and "optimizer" not in found
    assert config.deepspeed["zero_optimization"]["stage"] == stage


def test_matrices_decay_and_vectors_and_what_is_frozen_do_not(tmp_path):
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 4, bias=False), nn.Linear(4, 5))
    module[2].weight.requires_grad_(False)
    # What ZeRO-3 has partitioned is flat, and its real shape stands beside it.
    parted: Any = nn.Parameter(torch.zeros(6))
    parted.ds_shape = torch.Size((2, 3))
    module.register_parameter("parted", parted)
    optim = config_of(tmp_path, optim={"weight_decay": 0.07}).optim
    decayed, others = parameter_groups(module, optim)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.07, 0.0)
    want = (
        [module[0].weight, module[3].weight, parted],
        [module[0].bias, *module[1].parameters(), module[3].bias],
    )
    for group, parameters in zip((decayed, others), want, strict=True):
        assert {id(p) for p in group["params"]} == {id(p) for p in parameters}
    (alone,) = parameter_groups(module[1], optim)
    assert alone["weight_decay"] == 0.0 and len(alone["params"]) == 2
