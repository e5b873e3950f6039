"""One optimiser step of any number of micro-batches, and one step of an evaluation."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from madpo.kernels.token_scores import TokenScores
from madpo.trainer import global_batch
from madpo.trainer.batches.cost import StepWork
from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.batches.steps import Step
from madpo.trainer.engine import Engine
from madpo.trainer.metrics import Meter, add_batch, add_stats
from madpo.trainer.objectives.base import BatchState
from madpo.trainer.scoring_module import Mode, ScoringModule


class StepResult(NamedTuple):
    """What a training step returns."""

    memory: dict[str, list[float]]  # the objective's, for the next step's BatchState
    work: StepWork
    is_skipped: bool = False  # on all ranks: the gradient was not finite, and no weight has changed


def train_step(
    engine: Engine, step: Step, learning_rate: float, meter: Meter, state: BatchState
) -> StepResult:
    """Forward and backward of every micro-batch, then one optimiser update."""
    with meter.memory.phase("forward_backward"):
        result = forward_backward(engine, step, meter, state)
    with meter.memory.phase("optimizer"):
        is_updated = engine.step(learning_rate)
    return result._replace(is_skipped=not is_updated)


def forward_backward(engine: Engine, step: Step, meter: Meter, state: BatchState) -> StepResult:
    """Accumulate the gradients of a step.

    The host never waits for the device, except for a global-batch objective, whose scores the ranks
    exchange.
    """
    batches = [batch.to(engine.device) for batch in step.batches]
    if engine.module.head.objective.needs_batch:
        result = StepResult(*global_batch.forward_backward(engine, step, batches, meter, state))
    else:
        for batch in engine.accumulate(batches):
            out = engine(batch)
            engine.backward(out.loss)
            _measure(engine.module, meter, batch, out.tokens)
        result = StepResult({}, step.work)
    _count_skipped(meter, step)
    return result


@torch.no_grad()
def evaluation_step(engine: Engine, step: Step, meter: Meter, state: BatchState) -> None:
    """Fold the metrics of a chunk of held-out groups into the meter."""
    batches = [batch.to(engine.device) for batch in step.batches]
    with meter.memory.phase("evaluation"):
        if engine.module.head.objective.needs_batch:
            global_batch.evaluate(engine, step, batches, meter, state)
            return
        with engine.own_module_order("scoring"):
            for batch in batches:
                _measure(engine.module, meter, batch, engine(batch, Mode.SCORE).tokens)
    _count_skipped(meter, step)


def _count_skipped(meter: Meter, step: Step) -> None:
    """Count pairs of weight 0 in the mean loss, although no batch holds them. Rank 0 counts for all."""
    if step.skipped_items and dist.get_rank() == 0:
        meter.add_count("loss", step.skipped_items * step.copies)


@torch.no_grad()
def _measure(
    module: ScoringModule,
    meter: Meter,
    batch: PackedBatch,
    tokens: TokenScores,  # (M,)
) -> None:
    """Fold a batch's metrics into the meter.

    The head has already formed the loss that trains. The objective is computed here once more, on the
    small score vectors, for its value per item.
    """
    scored, objective = batch.scored(tokens), module.head.objective
    add_stats(meter, batch, module.stats)
    add_batch(meter, batch, scored, objective.of_groups(scored), objective)
