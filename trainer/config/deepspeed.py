"""Check the `deepspeed` block for keys that conflict with ours, are ignored by DeepSpeed, or cannot run here.

DeepSpeed itself ignores unknown keys in most places, and complains about others only when the model is
loaded, or by an assertion. Which keys it reads is asked of it, in deepspeed_keys.py.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from madpo.trainer.config.deepspeed_keys import check_keys
from madpo.trainer.errors import UserError

REFUSED_ZERO_KEYS = {
    "zenflow": "its updates lag behind the gradients; offload_optimizer is exact",
}
REFUSED_OFFLOAD_KEYS = {
    "super_offload": "it steps with an optimiser of its own, which does not see the schedule of optim",
    "ratio": "only an optimiser that is compiled can be split; the whole of it is offloaded",
}

MONITORS = ("comet", "csv_monitor", "tensorboard", "wandb")

HARMLESS = {"super_offload": False, "ratio": 1.0}
"""Values of refused keys that change nothing."""


def check_block(block: dict[str, Any]) -> None:
    """Raise UserError for keys that are unknown, set by us, or unusable here."""
    for key in block:
        if key in OWNED_DEEPSPEED_KEYS:
            raise UserError(f"deepspeed.{key}: madpo sets this itself; use {OWNED_DEEPSPEED_KEYS[key]}")
    zero = block.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 3) not in (1, 2, 3):
        raise UserError(f"deepspeed.zero_optimization: a mapping with stage 1, 2 or 3, got {zero!r}")
    where = "deepspeed.zero_optimization"
    for key in zero.keys() & REFUSED_ZERO_KEYS.keys():
        raise UserError(f"{where}.{key}: {REFUSED_ZERO_KEYS[key]}")
    for key in ("offload_param", "offload_optimizer"):
        _check_offload(f"{where}.{key}", zero.get(key), zero.get("stage", 3))
    if block.keys() - {"zero_optimization"} or zero.keys() - {"stage"}:  # else DeepSpeed need not be imported
        check_keys(block, OWNED_DEEPSPEED_KEYS)
    for key in MONITORS:
        if isinstance(block.get(key), dict) and block[key].get("enabled"):
            raise UserError(
                f"deepspeed.{key}: DeepSpeed would log each micro-batch's share of the loss, by names of its "
                "own; madpo writes metrics.jsonl and report.html; leave it out"
            )


def _check_offload(where: str, offload: Any, stage: int) -> None:
    if offload is None:
        return
    if not isinstance(offload, dict) or offload.get("device") not in ("none", "cpu", "nvme"):
        raise UserError(f"{where}: a mapping with device none, cpu or nvme, got {offload!r}")
    on_disk = offload["device"] == "nvme"
    if on_disk and not offload.get("nvme_path"):
        raise UserError(f"{where}.nvme_path: device nvme needs a folder on the node's own disk")
    if stage != 3 and (on_disk or where.endswith("param")):
        raise UserError(f"{where}: not in ZeRO stage {stage}; set deepspeed.zero_optimization.stage=3")
    for key, reason in REFUSED_OFFLOAD_KEYS.items():
        if offload.get(key) not in (None, HARMLESS[key]):
            raise UserError(f"{where}.{key}: {reason}; leave it out")


KEYS_OF_NUMBERS = (
    *("communication_data_type", "seq_parallel_communication_data_type", "data_types", "sparse_gradients"),
    *("compression_training", "zero_optimization.zero_quantized_weights"),
    *("zero_optimization.zero_quantized_gradients", "zero_optimization.zero_quantized_nontrainable_weights"),
)
"""Keys of the block that change the trained numbers by more than another order of sums does."""


def keys_of_numbers(block: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, of those that the block sets and that change the trained numbers."""
    zero = block.get("zero_optimization", {})
    flat = block | {f"zero_optimization.{key}": value for key, value in zero.items()}
    return {f"deepspeed.{key}": flat[key] for key in KEYS_OF_NUMBERS if key in flat}


def zero_stage(block: dict[str, Any], ranks: int) -> int:
    """The ZeRO stage that the block sets, else a default.

    The default is 3, which partitions the weights too. It is 2 for a single rank, which has nothing to
    partition, unless the block has a key of stage 3 (stage3_*, offload_*, zero_*).
    """
    zero = block.get("zero_optimization", {})
    of_stage_3 = any(key.startswith(("stage3_", "offload_", "zero_")) for key in zero)
    return zero.get("stage", 3 if ranks > 1 or of_stage_3 else 2)


def check_machine(block: dict[str, Any]) -> None:
    """Raise UserError for what this machine lacks. To be called on the machine that trains."""
    import torch

    where, zero = "deepspeed.zero_optimization", block.get("zero_optimization", {})
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"):
        if zero.get(key) and not torch.cuda.is_available():
            raise UserError(f"{where}.{key}: DeepSpeed quantises on GPUs only; leave it out")
    on_disk = [key for key in ("offload_param", "offload_optimizer") if offload_device(block, key) == "nvme"]
    if on_disk and not _can_offload_to_disk():
        raise UserError(
            f"{where}.{on_disk[0]}: device nvme needs libaio with its headers (apt install libaio-dev, dnf "
            "install libaio-devel; elsewhere than in the system's folders: set CFLAGS and LDFLAGS) and a C++ "
            "compiler; install them on every node, or set device=cpu"
        )


def _can_offload_to_disk() -> bool:
    builders: Any = import_module("deepspeed.ops.op_builder")
    return builders.AsyncIOBuilder().is_compatible(verbose=False)


def offload_device(block: dict[str, Any], key: str) -> str:
    """The device of `offload_param` or `offload_optimizer`: none, cpu or nvme."""
    return (block.get("zero_optimization", {}).get(key) or {}).get("device", "none")


OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_tokens",
    "managed_gradient_accumulation": "train.global_batch_size and train.micro_batch_tokens",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "the optim section",
    "scheduler": "optim.lr_scheduler_type",
    "bf16": "train.bf16",
    "bfloat16": "train.bf16",
    "fp16": "train.bf16",
    "gradient_allreduce_op": "nothing: the loss is a mean over the global batch",
    "prescale_gradients": "nothing: the loss is a mean over the global batch",
    "gradient_predivide_factor": "nothing: the loss is a mean over the global batch",
    "steps_per_print": "train.logging_steps",
    "activation_checkpointing": "model.gradient_checkpointing",
    "amp": "train.bf16",
    "compile": "nothing: layers run uncompiled",
    "torch_autocast": "train.bf16",
    "elasticity": "nothing: it would change the batch size",
    "data_efficiency": "nothing: it would change the order of the data",
    "curriculum_learning": "nothing: it would change the order of the data",
    "sequence_parallel_size": "train.sequence_parallel_size",
    "tensor_parallel": "nothing: every rank trains on its own groups, with the whole of the output layer",
    "expert_parallel": "nothing: every rank holds its share of all experts, as of all other weights",
    "checkpoint": "train.async_save; what DeepSpeed's own writers write cannot be resumed from",
    "datastates_ckpt": "train.save_steps: checkpoints are written and resumed from as one format",
    "pipeline": "nothing: every rank trains on its own groups",
}
"""Keys that would contradict the rest of the config -> what to set instead."""
