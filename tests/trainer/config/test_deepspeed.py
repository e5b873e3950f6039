"""What a `deepspeed` block can turn on for big models: the same numbers, the same resume, or a refusal."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import make_config, run_ranks, save_model, write_pairs
from kernel_cases import relative_error
from lora_cases import changed, train
from plain import zero3_steps
from small_runs import cut_off

from madpo.trainer.config.deepspeed import check_block, check_machine, zero_stage
from madpo.trainer.config.schema import Config

CPU = {"device": "cpu"}
OPTIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "offload_param": (2, {"offload_param": CPU}),
    "offload_both": (2, {"offload_param": CPU, "offload_optimizer": CPU}),
    "stage_2_offload": (2, {"stage": 2, "offload_optimizer": CPU}),
    "hpz": (4, {"zero_hpz_partition_size": 2}),
}
"""Name -> ranks, and what is in zero_optimization beside the tests' defaults."""


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    return config_of(tmp_path, tokenizer_folder)


def config_of(folder: Path, tokenizer: Path) -> Config:
    policy = save_model(folder / "policy", tokenizer, seed=1, tied=True)
    reference = save_model(folder / "reference", tokenizer, seed=2, tied=True)
    return make_config(
        folder,
        {
            "model": {"model_name_or_path": str(policy), "ref_model_name_or_path": str(reference)},
            "data": {"dataset_name": str(write_pairs(folder / "pairs.jsonl", 16))},
            "objective": {"loss_type": "madpo", "tau": 2.0},
            "optim": {"lr": 1e-3, "weight_decay": 0.01},
            "train": {"global_batch_size": 4, "export": False},
        },
    )


def with_zero(config: Config, zero: dict[str, Any], **sections: Any) -> Config:
    merged = {**config.deepspeed["zero_optimization"], **zero}
    return changed(config, deepspeed={"zero_optimization": merged}, **sections)


@pytest.fixture(scope="module")
def without_options(tmp_path_factory, tokenizer_folder) -> tuple[Config, list[Any]]:
    """A run, and its losses and gradients of three steps."""
    config = config_of(tmp_path_factory.mktemp("without"), tokenizer_folder)
    return config, run_ranks(2, zero3_steps, config, 3)[0]


@pytest.mark.ranks
@pytest.mark.parametrize("ranks, zero", OPTIONS.values(), ids=OPTIONS)
def test_an_option_changes_no_number(without_options, ranks, zero):
    """Losses and gradients of three steps, of which the second shows the first update."""
    config, want = without_options
    got = run_ranks(ranks, zero3_steps, with_zero(config, zero), 3)[0]
    for (loss, gradients), (true_loss, true_gradients) in zip(got, want, strict=True):
        assert loss == pytest.approx(true_loss, rel=1e-5)
        flat = [torch.cat([g[n].flatten() for n in sorted(gradients)]) for g in (gradients, true_gradients)]
        assert relative_error(*flat) < 1e-5


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["offload_both", pytest.param("hpz", marks=pytest.mark.slow)])
def test_resume_is_bitwise_also_with_a_reference_that_moves(config, tmp_path, name):
    """And the losses are those of a run without the option."""
    ranks, zero = OPTIONS[name]
    model = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    plain = changed(config, model=model, train={"save_steps": 2}, output_dir=str(tmp_path / "plain"))
    whole = with_zero(plain, zero, output_dir=str(tmp_path / "whole"))
    for run, count in ((plain, 2), (whole, ranks)):
        run_ranks(count, train, run)
    cut = cut_off(whole, tmp_path / "cut", 2)
    run_ranks(ranks, train, cut)
    assert losses(cut) == losses(whole) and len(losses(whole)) == 4
    assert losses(whole) == pytest.approx(losses(plain), rel=1e-5)
    for file in sorted((Path(whole.output_dir) / "checkpoints" / "step-00000004").glob("*_optim_states.pt")):
        got, want = (
            torch.load(
                Path(run.output_dir) / "checkpoints" / "step-00000004" / file.name, weights_only=False
            )["optimizer_state_dict"]
            for run in (cut, whole)
        )
        for ours, theirs in zip(got["fp32_flat_groups"], want["fp32_flat_groups"], strict=True):
            assert torch.equal(ours, theirs)


def losses(config: Config) -> list[float]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize(
    ("zero", "ranks", "stage"),
    [
        ({}, 1, 2),
        ({}, 2, 3),
        ({"overlap_comm": False}, 1, 2),
        ({"stage3_prefetch_bucket_size": 7}, 1, 3),
        ({"offload_param": CPU}, 1, 3),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, 1, 3),
        ({"stage": 1, "offload_optimizer": CPU}, 2, 1),
        ({"stage": 3}, 1, 3),
    ],
)
def test_a_lone_rank_shares_nothing_out_unless_it_is_asked_to(zero, ranks, stage):
    assert zero_stage({"zero_optimization": zero}, ranks) == stage
    assert zero or zero_stage({}, ranks) == stage


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"activation_checkpointing": {}}, r"activation_checkpointing: .* use model\.gradient_checkpointing"),
    ({"compile": {"deepcompile": True}}, r"deepspeed\.compile: .* layers run uncompiled"),
    ({"tensor_parallel": {"autotp_size": 2}}, r"tensor_parallel: .* the whole of the output layer"),
    ({"zero_optimization": {"mics_shard_size": 2}}, r"^deepspeed\.zero_optimization: MiCS .* been removed"),
    ({"nebula": {}}, r"^deepspeed\.nebula: .* has been removed"),
    ({"quantize_training": {}}, r"^deepspeed\.quantize_training: .* has been removed"),
    ({"bfloat16": {"enabled": False}}, r"^deepspeed\.bfloat16: madpo sets this itself; use train\.bf16$"),
    ({"expert_parallel": {}}, r"^deepspeed\.expert_parallel: .* holds its share of all experts"),
    ({"zero_optimisation": {}}, r"^deepspeed\.zero_optimisation: unknown key, did you mean 'zero_opti"),
    ({"flops_profiler": {"enabledd": True}}, r"^deepspeed\.flops_profiler\.enabledd: .* 'enabled'\?$"),
    ({"aio": {"block_sise": 1}}, r"^deepspeed\.aio\.block_sise: unknown key, did you mean 'block_size'\?$"),
    (
        {"checkpoint": {"writer": {"type": "fast"}}},
        r"checkpoint: .* use train\.async_save; .* cannot be resumed",
    ),
    ({"timers": {"throughput": {"enable": 1}}}, r"^deepspeed\.timers\.throughput\.enable: unknown key"),
    ({"comms_logger": {"prof_al": True}}, r"^deepspeed\.comms_logger\.prof_al: unknown .* 'prof_all'\?$"),
    ({"communication_data_type": "fp9"}, r"^deepspeed\.communication_data_type: .* cannot read 'fp9': "),
    ({"zero_optimization": {"cpu_offload": True}}, r"cpu_offload: .* given it up; use offload_optimizer$"),
    ({"comet": {"enabled": True}}, r"^deepspeed\.comet: DeepSpeed would log each micro-batch's"),
    ({"zero_optimization": {"zenflow": {}}}, r"zenflow: its updates lag behind"),
    ({"zero_optimization": {"offload_param": True}}, r"offload_param: a mapping with device .* got True"),
    (
        {"zero_optimization": {"offload_param": {"device": "gpu"}}},
        r"device none, cpu or nvme, got .*gpu",
    ),
    (
        {"zero_optimization": {"stage": 2, "offload_param": CPU}},
        r"offload_param: not in ZeRO stage 2; set",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
        r"optimizer\.nvme_path: device",
    ),
    (
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
        r"offload_optimizer: not in ZeRO stage 1",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {**CPU, "ratio": 0.5}}},
        r"optimizer\.ratio: only an",
    ),
    (
        {"zero_optimization": {"offload_optimizer": {**CPU, "super_offload": True}}},
        r"super_offload: it ",
    ),
    ({"zero_optimization": {"stag": 2}}, r"^deepspeed\.zero_optimization\.stag: unknown key, .*'stage'\?$"),
    (
        {"zero_optimization": {"offload_param": {**CPU, "pin_memori": True}}},
        r"zero_optimization\.offload_param\.pin_memori: unknown key, did you mean 'pin_memory'\?$",
    ),
    (
        {"zero_optimization": {"stage3_prefetch_bucket_size": -1}},
        r"stage3_prefetch_bucket_size: expected a whole number of at least 0, got -1$",
    ),
    ({"tensorboard": {"enabled": True}}, r"^deepspeed\.tensorboard: DeepSpeed would log each micro-batch's"),
]


@pytest.mark.parametrize("block, message", REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_what_would_contradict_or_go_unheard_is_refused(block, message):
    with pytest.raises(ValueError, match=message):
        check_block(block)


def test_nothing_is_refused_that_changes_nothing():
    check_block({"zero_optimization": {"offload_param": {"device": "none"}, "offload_optimizer": CPU}})
    check_block({"zero_optimization": {"allgather_bucket_size": 5e8, "reduce_bucket_size": "auto"}})
    check_block({"wandb": {"enabled": False}, "dump_state": True, "flops_profiler": {"enabled": True}})
    check_block({"aio": {"block_size": 1, "use_gds": True}})  # which this machine cannot do, and another may
    check_machine({})


@pytest.mark.parametrize("key", ["offload_param", "offload_optimizer"])
def test_a_machine_without_libaio_says_what_to_install(key, monkeypatch):
    builders: Any = import_module("deepspeed.ops.op_builder")
    block = {"zero_optimization": {key: {"device": "nvme", "nvme_path": "/local"}}}
    check_block(block)
    monkeypatch.setattr(builders.AsyncIOBuilder, "has_function", lambda *_: False)
    with pytest.raises(ValueError, match=rf"{key}: device nvme needs libaio .*apt install libaio-dev"):
        check_machine(block)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which can quantise")
@pytest.mark.parametrize("key", ["zero_quantized_weights", "zero_quantized_gradients"])
def test_quantised_traffic_needs_a_gpu(key):
    with pytest.raises(ValueError, match=rf"{key}: DeepSpeed quantises on GPUs only"):
        check_machine({"zero_optimization": {key: True}})
