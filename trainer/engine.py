"""The DeepSpeed engine: its config from ours, and one optimiser step of any number of micro-batches."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from madpo.trainer.config import Config, OptimConfig
from madpo.trainer.data.loader import Step
from madpo.trainer.data.packing import PackedBatch
from madpo.trainer.data.shapes import Work
from madpo.trainer.deepspeed_checks import zero_stage
from madpo.trainer.head import scored_span
from madpo.trainer.metrics import Meter, add_batch, add_stats
from madpo.trainer.objectives.base import BatchState
from madpo.trainer.traces import passes_of
from madpo.trainer.whole_batch import own_slopes, share_losses


def deepspeed_config(config: Config, training: bool = True) -> dict[str, Any]:
    """DeepSpeed's configuration. The user's `deepspeed` block comes last and fills or replaces."""
    ranks = dist.get_world_size()
    zero = {
        "stage": zero_stage(config.deepspeed, ranks),
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    user = dict(config.deepspeed)
    zero |= user.pop("zero_optimization", {})
    # Without stage 3, whose copies from and to the host overlap too, a lone rank would only wait for it.
    zero.setdefault("overlap_comm", torch.cuda.is_available() and (ranks > 1 or zero["stage"] == 3))
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


class Done(NamedTuple):
    """What is left of a step."""

    memory: dict[str, list[float]]  # what the objective wants to find in the next step's state
    work: Work


def train_step(engine: Any, step: Step, learning_rate: float, meter: Meter, state: BatchState) -> Done:
    """Forward and backward of every micro-batch, then one optimiser update."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    with meter.memory.phase("forward_backward"):
        done = forward_backward(engine, step, meter, state)
    with meter.memory.phase("optimizer"):
        engine.step()
    return done


def forward_backward(engine: Any, step: Step, meter: Meter, state: BatchState) -> Done:
    """The gradients of a step. For most objectives the host never waits for the device; one of the whole
    batch has to hand its scores round."""
    batches, done = [batch.to(engine.device) for batch in step.batches], Done({}, step.work)
    if engine.module.head.objective.needs_batch:
        done = (_whole_step_in_parts if len(batches) > 1 else _whole_step)(
            engine, step, batches, meter, state
        )
    else:
        for batch in _accumulated(engine, batches):
            loss, *rows = engine(batch)
            engine.backward(loss)
            _measure(engine.module, meter, batch, rows)
    _count_uncomputed(meter, step)
    return done


def _accumulated(engine: Any, batches: Sequence[PackedBatch]) -> Iterator[PackedBatch]:
    """The batches, whose gradients the engine puts together at the last."""
    for index, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        yield batch


def _whole_step(engine: Any, step: Step, batches: list[PackedBatch], meter: Meter, state: BatchState) -> Done:
    """As `forward_backward`, of a single micro-batch and an objective of the whole step, all of whose scores
    are to be known before the backward: its rows are scored twice, in the head."""
    head, memory = engine.module.head, dict[str, list[float]]()

    def find_slopes(batch: PackedBatch, rows: Sequence[Tensor | None]) -> Tensor:
        slopes, found = _shared(head, step, [batch], [rows], meter, state)
        memory.update(found)
        return own_slopes(slopes, batch)

    with passes_of(engine, "scoring and training"):
        for batch in _accumulated(engine, batches):
            loss, *_ = engine(batch, find_slopes)
            add_stats(meter, batch, engine.module.stats)
            engine.backward(loss)
    return Done(memory, step.work)


def _whole_step_in_parts(
    engine: Any, step: Step, batches: list[PackedBatch], meter: Meter, state: BatchState
) -> Done:
    """The same of several micro-batches: each is computed twice, the second time without the completions that
    turned out to be worth nothing."""
    module = engine.module
    slopes, memory = _shared(module.head, step, batches, _scored(engine, batches, meter), meter, state)
    own = [own_slopes(slopes, batch) for batch in step.batches]
    on_host = [dataclasses.replace(b, slopes=each) for b, each in zip(step.batches, own, strict=True)]
    work = step.work
    # The balance of the experts is a mean over all tokens, and slices of a row have no whole completions.
    if module.balance is None and module.sequence_group is None:
        on_host = [batch.without((each == 0).numpy()) for batch, each in zip(on_host, own, strict=True)]
        work += step.spared((slopes == 0).numpy())
    for batch in _accumulated(engine, [batch.to(engine.device) for batch in on_host]):
        loss, *_ = engine(batch)
        engine.backward(loss)
    return Done(memory, work)


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
) -> tuple[Tensor, dict[str, list[float]]]:
    """The slopes of all completions in losses that look at the whole step, and those losses' memory."""
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
