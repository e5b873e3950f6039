"""Train, from the newest checkpoint or from the start: any objective, any number of ranks."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from madpo.trainer import dist, heartbeat, lives, loop, stopping
from madpo.trainer.agreement import Agreement
from madpo.trainer.checkpoints.choose import choose
from madpo.trainer.checkpoints.folders import remove_partial
from madpo.trainer.checkpoints.identity import identity, without_length
from madpo.trainer.checkpoints.load import load
from madpo.trainer.checkpoints.manifest import Manifest
from madpo.trainer.checkpoints.saver import Keep, Saver
from madpo.trainer.config.deepspeed import zero_stage
from madpo.trainer.config.locate import located
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import first_groups, load_data, weighed
from madpo.trainer.data.views.weighed import weights_of
from madpo.trainer.dist import barrier
from madpo.trainer.errors import FRESH, CheckpointError, DataError
from madpo.trainer.incidents import Incidents
from madpo.trainer.metrics import MetricsFile
from madpo.trainer.model.build import known_tokens
from madpo.trainer.model.content import contents_of_models
from madpo.trainer.model.expert_balance import expert_notes
from madpo.trainer.model.freeze import count_parameters
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.pair_margins import PairMargins, StoredPairs, write_pairs
from madpo.trainer.reference.cached import check_policy_fits, reference_notes, with_reference
from madpo.trainer.reports.progress import Progress, print_line
from madpo.trainer.reports.remarks import remarks
from madpo.trainer.restarts import no_progress
from madpo.trainer.run_folder import claim
from madpo.trainer.schedule import run_length
from madpo.trainer.stages.end_of_turn import LOOKED_AT, endless, stop_at, taught_end
from madpo.trainer.stages.export import export_model
from madpo.trainer.stages.quantiles import resolve_quantiles
from madpo.trainer.stages.run_facts import describe_run, extensions, is_exported, versions, write_report
from madpo.trainer.stages.start_engine import check_data_fits, start_engine
from madpo.trainer.state import TrainState

Callback = Callable[[Mapping[str, float]], None]
"""Called with every logged record, on rank 0."""


def run_training(
    config: Config, command: str, callbacks: Sequence[Callback] = (), extend: bool = False
) -> None:
    """Train, evaluate, checkpoint and export into `output_dir`; continue a run that is already there.

    With `extend` that run may have had another length: it goes on to the length of `config`, on the schedule
    of a run of that length, and run.json says so.

    Data is read before the ranks join, because tokenising may take longer than a collective's timeout, and
    may fork. Raises UserError for a config, model or data set that cannot be trained, and what a callback
    raises.
    """
    folder = Path(config.output_dir)
    checkpoints = folder / "checkpoints"
    config = located(config)
    heartbeat.at("data")
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, True, known_tokens(config, tokenizer))
    shard = dist.init(config.launch.timeout_minutes, config.launch.start_timeout_minutes)
    with ExitStack() as cleanup:
        owned = claim(folder, shard)
        cleanup.callback(owned.release)
        config = resolve_quantiles(config, data, tokenizer, shard)
        first = first_groups(data)
        weights = None if first is None else weights_of(first, config.bound_objective)
        data = weighed(data, config)
        assert data.source is not None
        content = dist.from_main(data.source.content)
        dist.raise_if_any(
            None if data.source.content == content else _other_data(data.source.content, content)
        )
        made_with = identity(config, shard, data.source.content, contents_of_models(config, shard))
        kept = without_length(made_with) if extend else made_with
        chosen = choose(checkpoints, kept, shard, may_set_aside=True)
        step = chosen.manifest.state.step if chosen else None
        total_steps = run_length(config, data.source.num_groups).total_steps
        if step == total_steps and dist.from_main(is_exported(config, folder)):
            if shard.is_main:
                print_line(
                    f"finished at step {total_steps} already; --extend train.max_steps=N trains on, "
                    f"{FRESH} starts anew"
                )
            return
        dist.raise_if_any(no_progress(folder, step or 0) if shard.is_main else None)
        data, cached = with_reference(config, data, tokenizer, shard, training=True)
        source = data.source
        assert source is not None
        heartbeat.at("models")
        engine = start_engine(config, tokenizer, training=True)
        cleanup.callback(engine.release)
        # Of a stream no more than its first block: a bad row of a later one is for a later step.
        looked_at = source.take(0, LOOKED_AT if first is None else min(LOOKED_AT, len(first)))
        end, no_end = taught_end(*looked_at, tokenizer), endless(*looked_at, tokenizer)
        end_note = stop_at(engine.module.policy, end, tokenizer)
        check_data_fits(data, config, engine)
        state = load(engine, chosen) if chosen else TrainState()
        cleanup.enter_context(lives.recorded(folder, owned.life, shard, lambda: state.step))
        if cached is not None:
            check_policy_fits(config, engine, source, shard, cached, is_fresh=chosen is None)

        sinks: list[Callback] = []
        if shard.is_main:
            remove_partial(checkpoints)
            extended = extensions(folder, chosen, made_with)
            describe_run(folder, config, command, shard, total_steps, end, extended)
            write_report(folder, data)
            metrics = MetricsFile(folder, state.step)
            cleanup.callback(metrics.close)
            progress = Progress(total_steps)
            cleanup.callback(progress.close)
            cleanup.enter_context(stopping.stands(lambda: progress.stopped(state, checkpoints)))
            parameters = count_parameters(engine.module.policy)
            notes = [*engine.module.notes, *reference_notes(config, engine.module, source, cached)]
            notes += expert_notes(engine.module.policy, config.model.router_aux_loss_coef)
            notes += [end_note] if end_note else []
            notes += [no_end] if no_end and not config.bound_objective.is_reward_model else []
            notes += [f"extended after step {step}: {text}" for at, text in extended if at == step]
            if metrics.last_step > state.step:
                lost = f"{state.step + 1} to {metrics.last_step}"
                notes.append(f"steps {lost} are trained again: there is no sound checkpoint of them")
            notes += remarks(config, total_steps, parameters, weights)
            progress.announce(config, data.report, state, shard, engine.device, parameters, notes)
            sinks = [metrics.write, progress.show, *callbacks]
        barrier()

        def on_record(record: loop.Record) -> None:
            for sink in sinks:
                sink(record)

        def manifest() -> Manifest:
            if shard.is_main:
                write_report(folder, data)  # a stream's report grows
            stage, now = zero_stage(config.deepspeed, shard.world_size), copy.deepcopy(state)
            return Manifest(now, made_with, shard.world_size, stage, owned.life, versions(), files={})

        saver = Saver(
            engine,
            checkpoints,
            shard,
            Keep(config.train.save_total_limit, config.train.save_permanent_steps),
            Agreement(config.launch.timeout_minutes),
            manifest,
            in_background=config.train.async_save,
            with_reference=config.model.sync_ref_model,
            check_owner=owned.lost_to,
            say=print_line if shard.is_main else lambda _: None,
            last_step=step,
        )
        cleanup.callback(saver.close)
        incidents = Incidents(folder, shard.is_main)

        def on_pairs(step: int, pairs: PairMargins) -> None:
            if shard.is_main and data.held_out is not None:
                write_pairs(folder, StoredPairs(step, data.held_out.fingerprint, pairs))

        with stopping.between_steps():
            signal = loop.train(
                config, engine, source, data.held_out, shard, state, saver, on_record, on_pairs, incidents
            )
        if saver.last_step != state.step:  # why not has been said
            raise CheckpointError(f"the run ends without a checkpoint of its last step {state.step}")
        if signal:
            text = stopping.standing()
            if shard.is_main:
                print_line(text)
            raise stopping.StoppedError(text)
        if config.train.export:
            heartbeat.at("export")
            export_model(engine, tokenizer, config, folder, shard, state)


def _other_data(own: str, main: str) -> DataError:
    return DataError(
        f"data: rank 0 reads {main}, and {socket.gethostname()} {own}: other files of that name, or other "
        "caches; use data and data.cache_dir on storage that all hosts share"
    )
