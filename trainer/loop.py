"""The training loop and the evaluation, each one function that reads top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

from madpo.trainer import heartbeat, stopping
from madpo.trainer.agreement import Told
from madpo.trainer.batches.cost import StepWork
from madpo.trainer.batches.prefetch import prefetched
from madpo.trainer.batches.steps import evaluation_steps, step_rules, training_steps
from madpo.trainer.config.schema import Config
from madpo.trainer.data.groups import TokenDataset
from madpo.trainer.data.training_source import TrainingSource
from madpo.trainer.dist import Shard
from madpo.trainer.engine import Engine
from madpo.trainer.errors import NotFiniteError
from madpo.trainer.incidents import Incidents
from madpo.trainer.metrics import Meter
from madpo.trainer.model.flops import step_cost
from madpo.trainer.objectives.base import BatchState, Item
from madpo.trainer.pair_margins import PairCollector, PairMargins
from madpo.trainer.reference.moving import move_reference
from madpo.trainer.schedule import learning_rate, logging_steps, run_length
from madpo.trainer.state import TrainState
from madpo.trainer.step import evaluation_step, train_step
from madpo.trainer.throughput import peak_flops, throughput
from madpo.trainer.waiting import StepClock

Record = dict[str, float]

MINUTES_BETWEEN_SAVES = 30
"""How much work a run with `train.save_steps: auto` may lose."""


class Evaluation(NamedTuple):
    """What an evaluation returns, on all ranks."""

    record: Record
    pairs: PairMargins | None  # of an objective of pairs


class Saving(Protocol):
    """What the loop asks of whoever writes the checkpoints; all ranks ask at the same places."""

    last_step: int | None
    """The step of the newest checkpoint; None if there is none yet."""

    def agree(self, stop: int, save: bool, odd: bool = False) -> Told:
        """Tell the other ranks and hear from them, once a step; commits what all have written."""
        ...

    def save(self) -> None:
        """Begin a checkpoint of the run as it is."""
        ...

    def finish(self) -> None:
        """Wait for the checkpoint under way."""
        ...


class Unsaved:
    """In place of a saver: nothing is written, for measurements and tests."""

    last_step: int | None = None

    def agree(self, stop: int, save: bool, odd: bool = False) -> Told:
        return Told(stop=stop, save=save, odd=odd)

    def save(self) -> None:
        pass

    def finish(self) -> None:
        pass


def train(
    config: Config,
    engine: Engine,
    source: TrainingSource,
    held_out: TokenDataset | None,
    shard: Shard,
    state: TrainState,
    saver: Saving,
    on_record: Callable[[Record], None],
    on_pairs: Callable[[int, PairMargins], None] = lambda step, pairs: None,
    incidents: Incidents | None = None,
) -> int:
    """Train from `state` to the end of the run, or to the end of the step in which a rank is asked to stop.

    `on_record` gets every logged record, on all ranks; `on_pairs` gets the step of an evaluation and its
    margins; `incidents` looks at every step. Returns 0, or the number of the signal that stopped the run.
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
    clock = StepClock(engine.device)
    logged_step = state.step
    log_every = logging_steps(settings, length.total_steps)

    def evaluate_held_out(groups: TokenDataset) -> None:
        with clock.paused():
            record, pairs = evaluate(config, engine, groups, shard, state.memory)
        state.evaluated_step = state.step
        on_record(_stamped(record, state))
        if pairs is not None:
            on_pairs(state.step, pairs)

    def is_evaluation_due() -> bool:
        if state.evaluated_step == state.step:
            return False
        if state.step == 0:
            return settings.eval_on_start
        return state.step == length.total_steps or _due(state.step, settings.eval_steps)

    if held_out is not None and is_evaluation_due():  # the first, or one that a stop left out
        evaluate_held_out(held_out)
    engine.train()
    saved_at = time.monotonic()

    for step in prefetched(steps, engine.device):
        heartbeat.at(f"step {state.step + 1}")
        rate = learning_rate(config.optim, state.step, length.total_steps)
        batch_state, mark = BatchState(state.memory, (config.seed, state.step)), meter.mark()
        memory, step_work, is_skipped = train_step(engine, step, rate, meter, batch_state)
        state.step += 1
        state.consumed += step.num_groups
        state.num_tokens += step.work.tokens
        work += step_work
        if is_skipped:
            loss = meter.since(mark, "loss")
            meter.back_to(mark)  # one NaN would make those of the whole line NaN
            state.skipped += 1
            state.skipped_in_a_row += 1
            if incidents is not None:
                incidents.skipped(state.step, step.rows, loss, state.skipped_in_a_row)
            _check_skipped(state, settings.max_skipped_steps, saver.last_step)
        else:
            state.memory, state.skipped_in_a_row = memory, 0
            if incidents is not None:
                incidents.look_at(state.step, step.rows, engine.grad_norm, meter.since(mark, "loss"))
        if config.model.sync_ref_model and _due(state.step, config.model.ref_model_sync_steps):
            seed = config.seed + state.step  # a resumed run has the same
            alpha, models = config.model.ref_model_mixup_alpha, engine.module
            assert models.reference is not None
            move_reference(models.policy, models.reference, alpha, seed, engine.device)
        state.epoch = step.epoch
        is_last = state.step == length.total_steps

        due = settings.save_steps == "auto" and time.monotonic() - saved_at > MINUTES_BETWEEN_SAVES * 60
        odd = incidents is not None and incidents.is_odd
        agreed = saver.agree(stop=stopping.asked(), save=due, odd=odd)
        if incidents is not None and agreed.odd:
            incidents.write_odd()
        is_stopped = agreed.stop > 0 and not is_last
        logs = is_last or _due(state.step, log_every)
        # A checkpoint closes a log line, so that a resumed run logs the same numbers. One that is due by time
        # waits for a line, and the lines stay where they are.
        saves = (
            is_last or is_stopped or _due_to_save(state.step, settings.save_steps) or (agreed.save and logs)
        )
        if saves or logs:
            times = clock.take()
            record = {} if meter.is_empty else meter.reduce(times)  # empty if all steps were skipped
            record |= {} if is_skipped else {"grad_norm": float(engine.grad_norm)}
            record |= {
                "learning_rate": rate,
                "num_tokens": state.num_tokens,
                **throughput(work, state.step - logged_step, times.whole, shard.world_size, peak),
            }
            if state.skipped:
                record["train/skipped_steps"] = state.skipped
            if work.skipped_edges:
                record["data/skipped_edges"] = work.skipped_edges
            _check_finite(record, state.step, saver.last_step)
            on_record(_stamped(record, state))
            work = StepWork()
            logged_step = state.step

        if held_out is not None and is_evaluation_due() and not is_stopped:
            evaluate_held_out(held_out)
            engine.train()

        if saves:
            heartbeat.at(f"checkpoint of step {state.step}")
            with clock.paused():
                saver.save()
            saved_at = time.monotonic()

        if is_last or is_stopped:
            clock.stop()
            if incidents is not None:
                incidents.close()
            saver.finish()
            return agreed.stop if is_stopped else 0
    return 0


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
        heartbeat.at(f"evaluation, chunk {number + 1}")
        evaluation_step(engine, step, meter, BatchState(memory, (config.seed, number)))
        if collector is not None:
            collector.close_step(step)
    record, pairs = meter.reduce(), collector and collector.gather()
    record |= pairs.metrics() if pairs else {}
    return Evaluation({f"eval_{name}": value for name, value in record.items()}, pairs)


def _check_skipped(state: TrainState, most: int, saved_step: int | None) -> None:
    """Raise NotFiniteError after too many steps in a row without a finite gradient."""
    if state.skipped_in_a_row >= most:
        raise NotFiniteError(
            f"step {state.step}: the gradient was not finite in {state.skipped_in_a_row} steps in a row "
            f"(train.max_skipped_steps); {_stays(saved_step)}. incidents.jsonl has the rows; lower optim.lr, "
            "or look at those rows"
        )


def _check_finite(record: Record, step: int, saved_step: int | None) -> None:
    """Raise NotFiniteError before weights from a loss that is NaN or infinite reach a checkpoint.

    Every rank has the same record, so all stop.
    """
    loss, norm = record.get("loss", 0.0), record.get("grad_norm", 0.0)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NotFiniteError(
            f"step {step}: loss is {loss}, gradient norm {norm}; the run stops, {_stays(saved_step)}. Lower "
            "optim.lr, or look at the data of the last steps"
        )


def _stays(saved_step: int | None) -> str:
    return f"its checkpoint of step {saved_step} stays" if saved_step else "there is no checkpoint yet"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _due_to_save(step: int, every: int | Literal["auto"] | None) -> bool:
    return isinstance(every, int) and step % every == 0


def _stamped(record: Record, state: TrainState) -> Record:
    stamp = {"step": state.step, "time": time.time(), "epoch": round(state.epoch, 4)}
    return {**stamp, **record}
