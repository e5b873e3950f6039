"""The interleaved forward on two ranks: the numbers of two passes, each weight gathered once in forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_config, run_ranks, save_model, write_pairs
from lora_cases import STAGE_2, changed, stored_adapter
from plain import zero3_steps

from madpo.trainer.batches.steps import plan_step, step_rules
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages import start_engine as startup
from madpo.trainer.stages.start_engine import start_engine

pytestmark = pytest.mark.ranks

LAYERS = 4
SMALL = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 2000,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 10000,
}
"""ZeRO-3's distances in proportion to a tiny model: nothing is kept, and a part of a layer fetched ahead."""


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer_folder) -> Config:
    folder = tmp_path_factory.mktemp("interleaved")
    base = save_model(folder / "base", tokenizer_folder, seed=1, num_hidden_layers=LAYERS)
    stored_adapter(folder / "adapter", folder / "base", tokenizer_folder)
    return make_config(
        folder,
        {
            "model": {"model_name_or_path": str(base)},
            "peft": {"lora_r": 4, "lora_alpha": 8},
            "data": {"dataset_name": str(write_pairs(folder / "pairs.jsonl", 24))},
            "optim": {"lr": 3e-3},
            "train": {"global_batch_size": 7, "micro_batch_tokens": 128},
            "deepspeed": {"zero_optimization": SMALL},
        },
    )


def apart(function: Any) -> Any:
    """`function` with a pass each for policy and reference."""

    def run(*args: Any) -> Any:
        startup.interleave_reference = lambda module, device: None
        return function(*args)

    return run


VARIANTS: dict[str, dict[str, Any]] = {
    "zero-3": {},
    "checkpointing": {"model": {"gradient_checkpointing": True}},
    "frozen-copy": {"stored": True},
    "dora-zero-2": {"peft": {"use_dora": True}, "deepspeed": STAGE_2},
    "whole-batch": {"objective": {"loss_type": "beta_dpo"}},
    "bf16": {"train": {"bf16": True}},
}


@pytest.mark.parametrize("sections", VARIANTS.values(), ids=VARIANTS)
def test_two_ranks_train_bit_for_bit_as_in_two_passes(config, sections):
    sections = dict(sections)
    if sections.pop("stored", False):
        adapter = Path(str(config.model.model_name_or_path)).parent / "adapter"
        sections |= {"model": {"model_name_or_path": str(adapter)}, "peft": None}
    run = changed(config, **sections)
    got, want = (run_ranks(2, steps, run, 2)[0] for steps in (zero3_steps, apart(zero3_steps)))
    assert got[0][0] != got[1][0]
    for (loss, gradients), (true_loss, true_gradients) in zip(got, want, strict=True):
        assert loss == true_loss
        assert gradients.keys() == true_gradients.keys()
        assert all(torch.equal(gradients[name], true_gradients[name]) for name in gradients)


def traffic(shard, config: Config) -> dict[str, Any]:
    """Elements gathered in a forward pass, and in forward and backward, of three each; elements still whole
    when a backward pass has reached the first layer; and how many there are of which kind."""
    from deepspeed.comm import comm

    tokenizer = load_tokenizer(config.model)
    groups = load_data(config, tokenizer, training=True).train
    assert groups is not None
    engine: Any = start_engine(config, tokenizer, training=True)
    gathered = [0]
    backend: Any = comm.cdb
    gather = backend.all_gather_into_tensor

    def count(output_tensor: torch.Tensor, input_tensor: torch.Tensor, **options: Any) -> Any:
        gathered[0] += output_tensor.numel()
        return gather(output_tensor=output_tensor, input_tensor=input_tensor, **options)

    backend.all_gather_into_tensor = count
    parameters = dict(engine.module.named_parameters())
    whole: list[int] = []
    offload = engine.deepspeed.optimizer.parameter_offload
    release = offload.release_backward_leftovers

    def look_and_release() -> None:
        whole.append(sum(p.ds_numel for p in parameters.values() if p.ds_status.name == "AVAILABLE"))
        release()

    offload.release_backward_leftovers = look_and_release

    batch = plan_step(groups, np.arange(4), step_rules(config), shard).batches[0].to(engine.device)
    out: dict[str, Any] = {"forward": [], "both": []}
    for training in (False, False, False, True, True, True):
        gathered[0] = 0
        with torch.set_grad_enabled(training):
            loss, *_ = engine(batch)
        if training:
            engine.backward(loss)
            engine.step(3e-3)
        out["both" if training else "forward"].append(gathered[0])
    engine.release()
    layers = {name: p.ds_numel for name, p in parameters.items() if ".layers." in name}
    return out | {
        "whole": whole,
        "all": sum(p.ds_numel for p in parameters.values()),
        "base": sum(p.ds_numel for name, p in parameters.items() if "lora_" not in name),
        "head": parameters["policy.lm_head.weight"].ds_numel,
        "layer": sum(layers.values()) // LAYERS,
    }


@pytest.fixture(scope="module")
def both(config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The traffic of an interleaved forward and of two passes."""
    once, twice = (run_ranks(2, run, config)[0] for run in (traffic, apart(traffic)))
    return once, twice


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation-checkpointing"])
def test_every_weight_is_gathered_once_in_forward(config, both, checkpointing):
    """Before ZeRO-3 has recorded a module order and after. Two passes gather the base twice, but not
    the head, where both meet."""
    once, twice = both
    if checkpointing:
        config = changed(config, model={"gradient_checkpointing": True})
        once, twice = (run_ranks(2, run, config)[0] for run in (traffic, apart(traffic)))
    again = twice["base"] - twice["head"]
    assert once["forward"] == [once["all"]] * 3
    assert min(twice["forward"]) == once["all"] + again
    assert all(b - a >= again for a, b in zip(once["both"], twice["both"], strict=True))


def test_backward_lets_every_layer_go(both):
    """ZeRO-3 counts the uses of a layer whose backward pass is due; the reference's must not be the last."""
    for seen in both:
        assert len(seen["whole"]) == 3 and max(seen["whole"]) < seen["layer"] / 4
