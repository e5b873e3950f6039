"""The training loop and the evaluation, each one function that reads top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from madpo.trainer.batches.cost import StepWork
from madpo.trainer.batches.prefetch import prefetched
from madpo.trainer.batches.steps import evaluation_steps, step_rules, training_steps
from madpo.trainer.config.schema import Config
from madpo.trainer.data.groups import TokenDataset
from madpo.trainer.data.training_source import TrainingSource
from madpo.trainer.dist import Shard
from madpo.trainer.engine import Engine
from madpo.trainer.errors import UserError
from madpo.trainer.metrics import Meter
from madpo.trainer.model.flops import step_cost
from madpo.trainer.objectives.base import BatchState, Item
from madpo.trainer.pair_margins import PairCollector, PairMargins
from madpo.trainer.reference.moving import move_reference
from madpo.trainer.schedule import learning_rate, logging_steps, run_length
from madpo.trainer.state import TrainState
from madpo.trainer.step import evaluation_step, train_step
from madpo.trainer.throughput import peak_flops, throughput

Record = dict[str, float]


class Evaluation(NamedTuple):
    """What an evaluation returns, on all ranks."""

    record: Record
    pairs: PairMargins | None  # of an objective of pairs


def train(
    config: Config,
    engine: Engine,
    source: TrainingSource,
    held_out: TokenDataset | None,
    shard: Shard,
    state: TrainState,
    on_record: Callable[[Record], None],
    on_save: Callable[[], None],
    on_pairs: Callable[[int, PairMargins], None] = lambda step, pairs: None,
) -> None:
    """Train from `state` to the end of the run.

    `on_record` gets every logged record, on all ranks; `on_save` writes a checkpoint; `on_pairs` gets the
    step of an evaluation and its margins.
    """
    settings = config.train
    length = run_length(config, source.num_groups)
    rules = step_rules(config, engine.module, step_cost(engine.module))
    steps = training_steps(
        source, rules, settings.global_batch_size, shard, state.consumed, length.total_groups
    )
    peak = peak_flops(settings.peak_tflops, engine.device, settings.bf16)
    # What is summed up for the next log line, and since when.
    meter = Meter()
    work = StepWork()
    logged_at = time.perf_counter()
    logged_step = saved_step = state.step  # a run that continues does so from a checkpoint
    log_every = logging_steps(settings, length.total_steps)

    def evaluate_held_out(groups: TokenDataset, epoch: float) -> None:
        record, pairs = evaluate(config, engine, groups, shard, state.memory)
        on_record(_stamped(record, state, epoch))
        if pairs is not None:
            on_pairs(state.step, pairs)

    if held_out is not None and settings.eval_on_start and state.step == 0:
        evaluate_held_out(held_out, epoch=0.0)
        logged_at = time.perf_counter()
    engine.train()

    for step in prefetched(steps, engine.device):
        rate = learning_rate(config.optim, state.step, length.total_steps)
        batch_state = BatchState(state.memory, (config.seed, state.step))
        state.memory, step_work = train_step(engine, step, rate, meter, batch_state)
        state.step += 1
        state.consumed += step.num_groups
        state.num_tokens += step.work.tokens
        work += step_work
        if config.model.sync_ref_model and _due(state.step, config.model.ref_model_sync_steps):
            seed = config.seed + state.step  # a resumed run has the same
            alpha, models = config.model.ref_model_mixup_alpha, engine.module
            assert models.reference is not None
            move_reference(models.policy, models.reference, alpha, seed, engine.device)
        is_last = state.step == length.total_steps

        saves = is_last or _due(state.step, settings.save_steps)
        # A checkpoint closes a log line too, so that a resumed run logs the same numbers.
        if saves or _due(state.step, log_every):
            record = meter.reduce()
            seconds = time.perf_counter() - logged_at
            record |= {
                "grad_norm": engine.grad_norm(),
                "learning_rate": rate,
                "num_tokens": state.num_tokens,
                **throughput(work, state.step - logged_step, seconds, shard.world_size, peak),
            }
            if work.skipped_edges:
                record["data/skipped_edges"] = work.skipped_edges
            _check_finite(record, state.step, saved_step)
            on_record(_stamped(record, state, step.epoch))
            work = StepWork()
            logged_at = time.perf_counter()
            logged_step = state.step

        if held_out is not None and (is_last or _due(state.step, settings.eval_steps)):
            paused = time.perf_counter()
            evaluate_held_out(held_out, step.epoch)
            engine.train()
            logged_at += time.perf_counter() - paused

        if saves:
            paused = time.perf_counter()
            on_save()
            saved_step = state.step
            logged_at += time.perf_counter() - paused


def evaluate(
    config: Config,
    engine: Engine,
    groups: TokenDataset,
    shard: Shard,
    memory: Mapping[str, list[float]],
) -> Evaluation:
    """Metrics over all groups, names prefixed with `eval_`. Leaves the engine in evaluation mode.

    A global-batch objective sees chunks of `global_batch_size` groups; `memory` stays as it is.
    """
    engine.eval()
    has_pairs = config.bound_objective.item is Item.EDGE
    collector = PairCollector(groups.counts.edges, engine.device) if has_pairs else None
    meter = Meter(collector)
    rules = step_rules(config, engine.module, step_cost(engine.module, training=False))
    steps = evaluation_steps(groups, rules, config.train.global_batch_size, shard)
    for number, step in enumerate(prefetched(steps, engine.device)):
        evaluation_step(engine, step, meter, BatchState(memory, (config.seed, number)))
        if collector is not None:
            collector.close_step(step)
    record, pairs = meter.reduce(), collector and collector.gather()
    record |= pairs.metrics() if pairs else {}
    return Evaluation({f"eval_{name}": value for name, value in record.items()}, pairs)


def _check_finite(record: Record, step: int, saved_step: int) -> None:
    """Raise UserError before weights from a NaN or infinite loss reach a checkpoint.

    Every rank has the same record, so all stop.
    """
    if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
        kept = f"its checkpoint of step {saved_step} is sound" if saved_step else "there is no checkpoint yet"
        raise UserError(
            f"step {step}: loss is {record['loss']}, gradient norm {record['grad_norm']}; the run stops, "
            f"{kept}. Lower optim.lr, or look at the data of the last steps"
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _stamped(record: Record, state: TrainState, epoch: float) -> Record:
    stamp = {"step": state.step, "time": time.time(), "epoch": round(epoch, 4)}
    return {**stamp, **record}
