"""One message when a GPU's memory is used up: what holds it, and which keys to change, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from madpo.trainer.config.deepspeed import zero_stage
from madpo.trainer.config.effects import may_continue
from madpo.trainer.config.schema import Config
from madpo.trainer.errors import FRESH, UserError
from madpo.trainer.objectives.base import Need

GIB = 2**30
HOLDERS = {"load": "weights", "start": "optimiser", "forward_backward": "gradients"}
"""Phase of a run -> what it leaves in memory at its end, in the order of the phases."""
TRAINING = ("train", "sft", "reward")

_left: dict[str, float] = {}  # phase -> GiB; of the process, as torch's allocator is


def note(phase: str) -> None:
    """Remember how much memory a phase leaves allocated. torch counts that anyway; nothing waits for it."""
    if phase == "load":  # a new start
        _left.clear()
    if torch.cuda.is_available():
        _left[phase] = torch.cuda.memory_allocated() / GIB


@contextmanager
def explained(config: Config, task: str) -> Iterator[None]:
    """Raise UserError with the message in place of torch's error, if a GPU's memory is used up inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(_explain(error, config, task)) from None


def _explain(error: torch.OutOfMemoryError, config: Config, task: str) -> str:
    """The message for an error that is being handled: what its frames hold is still allocated."""
    taken = total = 0.0
    if torch.cuda.is_available():
        taken, total = torch.cuda.memory_allocated() / GIB, torch.cuda.mem_get_info()[1] / GIB
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return message(str(error), _left, taken, total, config, task, ranks)


def message(
    error: str, left: Mapping[str, float], taken: float, total: float, config: Config, task: str, ranks: int
) -> str:
    """Say what memory is taken by, and what to change.

    `left` is what was allocated at the end of each phase so far, `taken` what is now, `total` the GPU's
    memory, all in GiB.
    """
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", error)
    holders, before = dict[str, float](), 0.0
    for phase, holder in HOLDERS.items():
        if phase in left:
            holders[holder], before = max(left[phase] - before, 0.0), left[phase]
    holders["activations, logits and buffers" if holders else "all"] = max(taken - before, 0.0)
    sizes = "".join(f"\n  {gib:8.2f} GiB  {holder}" for holder, gib in holders.items())
    router_loss = config.model.router_aux_loss_coef > 0
    lines = list[str]()
    for override, cost in remedies(config, task, ranks):
        fixed = task in TRAINING and not may_continue(override.split("=")[0], router_loss)
        lines.append(f"\n  {override}  ({cost}{f'; a new run, with {FRESH}' if fixed else ''})")
    more = f": {asked[1]} more were asked for" if asked else ""
    return (
        f"CUDA out of memory{more}; torch holds {taken:.2f} of the GPU's {total:.2f} GiB:{sizes}\n"
        "change the first of these that you can, and give the same command again (docs/memory.md):"
        f"{''.join(lines)}"
    )


def remedies(config: Config, task: str, ranks: int) -> Iterator[tuple[str, str]]:
    """Overrides that save memory and what each costs, the cheapest first; none that is set already."""
    model, train, objective = config.model, config.train, config.bound_objective
    zero = config.deepspeed.get("zero_optimization", {})
    trains = task in TRAINING
    if task == "generate":
        batch_size = config.generate.batch_size if config.generate else 64
        if batch_size > 1:
            yield f"generate.batch_size={batch_size // 2}", "other samples, slower"
        return
    completions = 1 if objective.supervised else 2
    least = -(-completions * config.data.max_length // train.sequence_parallel_size)
    if train.micro_batch_tokens > least:
        yield f"train.micro_batch_tokens={max(least, train.micro_batch_tokens // 2)}", "smaller products"
    if train.head_gib > 0.25 and not objective.is_reward_model:
        yield f"train.head_gib={max(0.25, train.head_gib / 2):g}", "smaller products in the loss head"
    if trains and model.gradient_checkpointing is False:
        yield "model.gradient_checkpointing=selective", "some activations are computed again"
    if trains and model.gradient_checkpointing is not True:
        yield "model.gradient_checkpointing=true", "a third more time"
    is_second_model = model.reference == "joint" or (model.reference == "auto" and config.peft is None)
    may_cache = not (model.sync_ref_model or config.data.streaming or Need.KL in objective.needs)
    if objective.needs_reference and is_second_model and may_cache:
        yield "model.reference=cached", "scored once, before training"
    if trains and config.peft is None and model.init_config is None:
        yield "peft={}", "an adapter in place of all weights, with a higher optim.lr"
    if trains and "offload_optimizer" not in zero:
        yield "deepspeed.zero_optimization.offload_optimizer={device: cpu}", "updates on the host, slower"
    if zero_stage(config.deepspeed, ranks) == 3 and "offload_param" not in zero:
        yield "deepspeed.zero_optimization.offload_param={device: cpu}", "weights come from the host, slower"
    if trains and not model.activation_offloading:
        yield "model.activation_offloading=true", "activations wait on the host"
    yield f"data.max_length={config.data.max_length // 2}", "longer answers are cut"
