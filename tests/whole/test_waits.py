"""The host does not wait for the device in forward and backward of a step.

On a CPU nothing waits, but the operations that would can be counted: those that hand a value to Python, and
those whose result has a size that only the device knows. On a GPU (`make test-gpu`) torch refuses to wait.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_config, run_ranks, save_model, write_pairs
from kernel_cases import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from madpo.trainer import dist
from madpo.trainer.batches.prefetch import prefetched
from madpo.trainer.batches.steps import plan_step, step_rules
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.metrics import Meter
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import BatchState
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.step import forward_backward

pytestmark = pytest.mark.ranks

WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")
OBJECTIVES = {
    "madpo": {"loss_type": "madpo", "tau": 2.0},
    "ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo"},
    "by-autograd": {"loss_type": "exo_pair"},
    "tokens": {"loss_type": "nll"},
    "distributions": {"loss_type": "tdpo"},
    "rewards": {"loss_type": "bradley_terry"},
    "whole-batch": {"loss_type": "kto"},
}
ALONE = {name: objective for name, objective in OBJECTIVES.items() if name != "whole-batch"}
"""Objectives that do not hand the scores of a step round."""

WARM = 3
"""Steps after which ZeRO-3 knows the order of modules, which ranks compare while it is learnt."""


class Waits(TorchDispatchMode):
    """Counts the operations after which the host would have to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        grows = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or grows:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def prepared(tmp_path, tokenizer_folder, objective: dict[str, Any], **sections: Any) -> Config:
    """A model of one layer: others would do nothing else."""
    model = save_model(tmp_path / "start", tokenizer_folder, seed=1, num_hidden_layers=1)
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 20))},
            "objective": objective,
            **sections,
        },
    )


def engine_and_steps(shard, config: Config, count: int) -> tuple[Any, Any]:
    tokenizer = load_tokenizer(config.model)
    groups = load_data(config, tokenizer, training=True).train
    assert groups is not None
    rules, indices = step_rules(config), np.arange(8)
    engine = start_engine(config, tokenizer, training=True)
    engine.train()
    steps = (plan_step(groups, indices, rules, shard) for _ in range(count))
    return engine, prefetched(steps, engine.device)


def waits(shard, config: Config) -> tuple[Counter[str], Counter[str]]:
    """The waits of a step's forward and backward, and of DeepSpeed's optimiser step."""
    engine, steps = engine_and_steps(shard, config, WARM + 1)
    ours, theirs = Waits(), Waits()
    for step in steps:
        ours, theirs, meter = Waits(), Waits(), Meter()
        with ours:
            forward_backward(engine, step, meter, BatchState())
        with theirs:
            engine.step(1e-3)
        assert meter.reduce()["loss"] > 0
    engine.release()
    return ours.found, theirs.found


@pytest.mark.skipif(DEVICE == "cuda", reason="a process that has used the GPU cannot be forked")
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_step_hands_no_value_to_the_host(tmp_path, tokenizer_folder, objective):
    ours, theirs = run_ranks(1, waits, prepared(tmp_path, tokenizer_folder, objective))[0]
    assert not ours
    # DeepSpeed asks once whether the gradient's norm is finite; AdamW's count of steps, one for each of the
    # two groups of parameters, is on the host.
    assert set(theirs) == {"_local_scalar_dense"} and theirs.total() <= 3


def test_what_would_wait_is_found():
    x = torch.arange(4.0)
    with Waits() as found:
        _ = x[x > 1], x.nonzero(), bool((x > 1).any()), x.sum().item()
        torch.repeat_interleave(torch.tensor([1, 2]))
        torch.repeat_interleave(torch.tensor([1, 2]), output_size=3)
    assert found.found == {"index": 1, "nonzero": 1, "_local_scalar_dense": 2, "repeat_interleave": 1}


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: make test-gpu")
@pytest.mark.parametrize("objective", ALONE.values(), ids=ALONE)
def test_on_a_gpu_the_host_does_not_wait(tmp_path, tokenizer_folder, objective):
    """In this process, and in one world for all cases: DeepSpeed keeps the groups of the first."""
    config = prepared(tmp_path, tokenizer_folder, objective, train={"bf16": True})
    engine, steps = engine_and_steps(dist.init(1.0), config, WARM + 1)
    for number, step in enumerate(steps):
        assert all(batch.input_ids.is_pinned() for batch in step.batches)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if number == WARM else "default")
        forward_backward(engine, step, Meter(), BatchState())
        torch.cuda.set_sync_debug_mode("default")
        engine.step(1e-3)
    engine.release()
