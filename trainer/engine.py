"""The DeepSpeed engine: its config from ours, and one optimiser step of any number of micro-batches."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from madpo.trainer.config import Config, OptimConfig
from madpo.trainer.data.loader import Step
from madpo.trainer.data.packing import PackedBatch
from madpo.trainer.deepspeed_checks import zero_stage
from madpo.trainer.head import scored_span
from madpo.trainer.metrics import Meter, add_batch, add_stats
from madpo.trainer.objectives.base import BatchState
from madpo.trainer.traces import passes_of
from madpo.trainer.whole_batch import share_losses


def deepspeed_config(config: Config, training: bool = True) -> dict[str, Any]:
    """DeepSpeed's configuration. The user's `deepspeed` block comes last and fills or replaces."""
    zero = {
        "stage": zero_stage(config.deepspeed, dist.get_world_size()),
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    user = dict(config.deepspeed)
    zero |= user.pop("zero_optimization", {})
    if not training and zero["stage"] < 3:
        zero["stage"] = 0  # no optimiser to shard, and DeepSpeed refuses to
    out: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # bookkeeping only: micro-batches are packed to a budget
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.max_grad_norm,
        "steps_per_print": 10**9,
        "bf16": {"enabled": config.train.bf16},
        # Gradients of micro-batches are summed in fp32; DeepSpeed would sum them in the model's dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        **user,
    }
    if training:
        out["optimizer"] = {
            "type": "AdamW",
            "params": {
                "lr": config.optim.lr,
                "betas": [config.optim.adam_beta1, config.optim.adam_beta2],
                "eps": config.optim.adam_epsilon,
                "weight_decay": config.optim.weight_decay,
                # torch's own AdamW compiles nothing and resumes bit for bit; fused, it goes through the
                # weights once, which on a CPU takes a quarter of the time.
                "torch_adam": True,
                "fused": True,
            },
        }
    return out


def build_engine(config: Config, module: nn.Module, training: bool = True) -> Any:
    """A DeepSpeed engine around the module. Without `training` it has no optimiser."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    groups: Any = parameter_groups(module, config.optim) if training else None
    with redirect_stdout(StringIO()):  # where it prints how much memory there is, in bf16 without stage 3
        engine, *_ = deepspeed.initialize(
            model=module,
            config=deepspeed_config(config, training),
            model_parameters=groups,
        )
    return engine


def release(engine: Any) -> None:
    """Free what an engine holds. DeepSpeed's hooks keep it and its module alive after `destroy`, so weights
    and optimiser are taken out of them."""
    sharded = engine.optimizer
    engine.destroy()
    for optimizer in (getattr(sharded, "optimizer", None), sharded):
        if optimizer is not None:
            vars(optimizer).clear()
    for parameter in engine.module.parameters():
        for partition in ("ds_tensor", "ds_secondary_tensor"):
            if getattr(parameter, partition, None) is not None:
                setattr(parameter, partition, None)
        parameter.data, parameter.grad = parameter.data.new_empty(0), None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters, matrices with weight decay and vectors (norms, biases) without."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # A parameter that ZeRO-3 has partitioned keeps its real shape in ds_shape.
    is_matrix = [len(getattr(parameter, "ds_shape", parameter.shape)) > 1 for parameter in trainable]
    groups = [
        {
            "params": [p for p, matrix in zip(trainable, is_matrix, strict=True) if matrix is wanted],
            "weight_decay": decay,
        }
        for wanted, decay in ((True, optim.weight_decay), (False, 0.0))
    ]
    return [group for group in groups if group["params"]]


def train_step(
    engine: Any, step: Step, learning_rate: float, meter: Meter, state: BatchState
) -> dict[str, list[float]]:
    """Forward and backward of every micro-batch, then one optimiser update.

    Returns what the objective wants to find in the next step's state.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    with meter.memory.phase("forward_backward"):
        memory = forward_backward(engine, step, meter, state)
    with meter.memory.phase("optimizer"):
        engine.step()
    return memory


def forward_backward(engine: Any, step: Step, meter: Meter, state: BatchState) -> dict[str, list[float]]:
    """The gradients of a step, and what `train_step` returns. For most objectives the host never waits for
    the device; one of the whole batch has to hand its scores round."""
    batches, memory = [batch.to(engine.device) for batch in step.batches], {}
    if engine.module.head.objective.needs_batch:
        memory = _whole_step(engine, step, batches, meter, state)
    else:
        for batch in _accumulated(engine, batches):
            loss, *rows = engine(batch)
            engine.backward(loss)
            _measure(engine.module, meter, batch, rows)
    _count_uncomputed(meter, step)
    return memory


def _accumulated(engine: Any, batches: Sequence[PackedBatch]) -> Iterator[PackedBatch]:
    """The batches, whose gradients the engine puts together at the last."""
    for index, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        yield batch


def _whole_step(
    engine: Any, step: Step, batches: list[PackedBatch], meter: Meter, state: BatchState
) -> dict[str, list[float]]:
    """As `forward_backward`, for an objective of the whole step, all of whose scores are to be known before
    the first backward. So of several micro-batches each is computed twice; of a single one only its rows are
    scored twice, in the head."""
    head = engine.module.head
    if len(batches) > 1:
        rows = _scored(engine, batches, meter)
        slopes, memory = _shared(head, step, batches, rows, meter, state)
        pairs = zip(batches, slopes, strict=True)
        for batch in _accumulated(engine, [dataclasses.replace(each, slopes=slope) for each, slope in pairs]):
            loss, *_ = engine(batch)
            engine.backward(loss)
        return memory
    memory = {}

    def find_slopes(batch: PackedBatch, rows: Sequence[Tensor | None]) -> Tensor:
        (slopes,), found = _shared(head, step, [batch], [rows], meter, state)
        memory.update(found)
        return slopes

    with passes_of(engine, "scoring and training"):
        for batch in _accumulated(engine, batches):
            loss, *_ = engine(batch, find_slopes)
            add_stats(meter, batch, engine.module.stats)
            engine.backward(loss)
    return memory


@torch.no_grad()
def evaluation_step(engine: Any, step: Step, meter: Meter, state: BatchState) -> None:
    """The metrics of a stretch of held-out groups."""
    batches = [batch.to(engine.device) for batch in step.batches]
    with meter.memory.phase("evaluation"):
        if engine.module.head.objective.needs_batch:
            rows = _scored(engine, batches, meter)
            _shared(engine.module.head, step, batches, rows, meter, state)
            return
        with passes_of(engine, "scoring"):
            for batch in batches:
                _, *rows = engine(batch)
                _measure(engine.module, meter, batch, rows)
    _count_uncomputed(meter, step)


def _count_uncomputed(meter: Meter, step: Step) -> None:
    """Items of loss 0 that are in the mean and in no batch; one rank counts them for all."""
    if step.uncomputed and dist.get_rank() == 0:
        meter.add_count("loss", step.uncomputed * step.copies)


@torch.no_grad()
def _scored(engine: Any, batches: Sequence[PackedBatch], meter: Meter) -> list[list[Tensor | None]]:
    """What is known of the rows of each batch."""
    out = []
    with passes_of(engine, "scoring"):
        for batch in batches:
            _, *rows = engine(batch)
            add_stats(meter, batch, engine.module.stats)
            out.append(rows)
    return out


@torch.no_grad()
def _shared(
    head: Any,
    step: Step,
    batches: Sequence[PackedBatch],
    rows: Sequence[Sequence[Tensor | None]],
    meter: Meter,
    state: BatchState,
) -> tuple[list[Tensor], dict[str, list[float]]]:
    """The slopes (S,) of each batch in losses that look at the whole step, and those losses' memory."""
    scored = [scored_span(batch, *known) for batch, known in zip(batches, rows, strict=True)]  # type: ignore[arg-type]
    outcomes, slopes = share_losses(step, batches, scored, head.objective, head.params, state)
    for batch, scores, outcome in zip(batches, scored, outcomes, strict=True):
        add_batch(meter, batch, scores, outcome, head.objective, head.params)
    return slopes, outcomes[0].memory


@torch.no_grad()
def _measure(module: Any, meter: Meter, batch: PackedBatch, rows: list[Tensor]) -> None:
    head, scored = module.head, scored_span(batch, *rows)
    add_stats(meter, batch, module.stats)
    add_batch(meter, batch, scored, head.objective(scored, head.params), head.objective, head.params)


@torch.no_grad()
def move_reference(engine: Any, alpha: float, seed: int) -> None:
    """Every weight of the reference becomes alpha * policy + (1 - alpha) * reference: TR-DPO's soft update,
    and with alpha 1 its hard one.

    One pair of weights is gathered at a time. Policy and reference differ by about one unit in the last
    place of bfloat16, which plain rounding would move all of the way or not at all: narrow weights are
    rounded up or down at random, in proportion, in draws that depend on `seed` alone.
    Source: Gorbatovski et al. 2024 (arXiv 2404.09656).
    """
    import deepspeed

    policy, reference = engine.module.policy, engine.module.reference
    random = torch.Generator(engine.device).manual_seed(seed)
    for ours, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours, theirs], modifier_rank=0):
            mixed = torch.lerp(theirs.float(), ours.float(), alpha)
            theirs.data.copy_(_rounded(mixed, random) if theirs.dtype == torch.bfloat16 else mixed)


def _rounded(x: Tensor, random: torch.Generator) -> Tensor:
    """x float32 as one of its two neighbours in bfloat16, whose mean over draws is x."""
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, generator=random, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def grad_norm(engine: Any) -> float:
    """The norm of the last step's gradient over all ranks, before clipping."""
    norm = engine.get_global_grad_norm()
    return float(norm.item() if isinstance(norm, Tensor) else norm)
