"""What an engine held is free after it was released, though DeepSpeed still refers to the engine."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_config, run_ranks, save_model, write_pairs
from lora_cases import changed

from madpo.trainer.batches.steps import plan_step, step_rules
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.metrics import Meter
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import BatchState
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.step import train_step

pytestmark = pytest.mark.ranks


def live_bytes() -> int:
    """The bytes of all tensors that Python can reach, but for other tests' tensors without memory."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def held_and_left(shard, config: Config, training: bool) -> tuple[int, int]:
    """Bytes that an engine after a step holds, and that stay when it is released."""
    tokenizer = load_tokenizer(config.model)
    groups = load_data(config, tokenizer, training=True).train
    assert groups is not None
    before, held = live_bytes(), 0
    for _ in range(2):
        engine = start_engine(config, tokenizer, training)
        if training:
            step = plan_step(groups, np.arange(4), step_rules(config), shard)
            train_step(engine, step, 1e-3, Meter(), BatchState())
        held = live_bytes() - before
        engine.release()
        del engine
    return held, live_bytes() - before


CPU = {"device": "cpu"}
CASES: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "alone": (1, False, {"stage": 2}),
    "alone in bf16": (1, True, {"stage": 2}),
    "stage 1 in bf16": (1, True, {"stage": 1}),
    "stage 3": (2, False, {}),
    "stage 3 in bf16": (2, True, {}),
    "offloaded": (2, False, {"offload_param": CPU, "offload_optimizer": CPU}),
    "hpZ": (2, False, {"zero_hpz_partition_size": 2}),
}


SCORING = ("alone in bf16", "stage 3", "offloaded")
"""Without an optimiser the others hold nothing else."""


@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in CASES), *((name, False) for name in SCORING)]
)
def test_nothing_of_an_engine_stays(tmp_path, tokenizer_folder, name, training):
    ranks, bf16, zero = CASES[name]
    config = make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(save_model(tmp_path / "start", tokenizer_folder, seed=1))},
            "data": {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 12))},
            "objective": {"loss_type": "dpo"},
            "train": {"bf16": bf16},
        },
    )
    zero = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000, **zero}
    config = changed(config, deepspeed={"zero_optimization": zero})
    for held, left in run_ranks(ranks, held_and_left, config, training):
        assert held > 50_000 and left < 0.03 * held
