"""Train, from the newest checkpoint or from the start: any objective, any number of ranks."""

from __future__ import annotations

import copy
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from madpo.trainer import dist, loop, stopping
from madpo.trainer.agreement import Agreement
from madpo.trainer.checkpoints.choose import Chosen, choose
from madpo.trainer.checkpoints.folders import MANIFEST, newest_checkpoint, remove_partial
from madpo.trainer.checkpoints.identity import LENGTH, identity, without_length
from madpo.trainer.checkpoints.load import load
from madpo.trainer.checkpoints.manifest import Manifest
from madpo.trainer.checkpoints.saver import Keep, Saver
from madpo.trainer.config.deepspeed import zero_stage
from madpo.trainer.config.locate import located
from madpo.trainer.config.schema import Config, dump
from madpo.trainer.data.training_data import Data, first_groups, load_data, weighed
from madpo.trainer.data.views.weighed import weights_of
from madpo.trainer.dist import Shard, barrier
from madpo.trainer.errors import FRESH, CheckpointError
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
from madpo.trainer.run_folder import claim
from madpo.trainer.schedule import run_length
from madpo.trainer.stages.end_of_turn import stop_at, taught_end
from madpo.trainer.stages.export import export_model
from madpo.trainer.stages.quantiles import resolve_quantiles
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
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, True, known_tokens(config, tokenizer))
    shard = dist.init(config.launch.timeout_minutes)
    with ExitStack() as cleanup:
        owned = claim(folder, shard)
        cleanup.callback(owned.release)
        config = resolve_quantiles(config, data, tokenizer, shard)
        first = first_groups(data)
        weights = None if first is None else weights_of(first, config.bound_objective)
        data = weighed(data, config)
        assert data.source is not None
        made_with = identity(config, shard, data.source.content, contents_of_models(config, shard))
        kept = without_length(made_with) if extend else made_with
        chosen = choose(checkpoints, kept, shard, may_set_aside=True)
        step = chosen.manifest.state.step if chosen else None
        total_steps = run_length(config, data.source.num_groups).total_steps
        if step == total_steps and dist.from_main(is_exported(config, folder)):
            if shard.is_main:
                print_line(f"finished at step {total_steps} already; {FRESH} starts anew")
            return
        data, cached = with_reference(config, data, tokenizer, shard, training=True)
        source = data.source
        assert source is not None
        engine = start_engine(config, tokenizer, training=True)
        cleanup.callback(engine.release)
        end = taught_end(source, tokenizer)
        end_note = stop_at(engine.module.policy, end, tokenizer)
        check_data_fits(data, config, engine)
        state = load(engine, chosen) if chosen else TrainState()
        if cached is not None:
            check_policy_fits(config, engine, source, shard, cached, is_fresh=chosen is None)

        sinks: list[Callback] = []
        if shard.is_main:
            remove_partial(checkpoints)
            extended = _extensions(folder, chosen, made_with)
            _describe_run(folder, config, command, shard, total_steps, end, extended)
            _write_report(folder, data)
            metrics = MetricsFile(folder, state.step)
            cleanup.callback(metrics.close)
            progress = Progress(total_steps)
            cleanup.callback(progress.close)
            cleanup.enter_context(stopping.stands(lambda: progress.stopped(state, checkpoints)))
            parameters = count_parameters(engine.module.policy)
            notes = [*engine.module.notes, *reference_notes(config, engine.module, source, cached)]
            notes += expert_notes(engine.module.policy, config.model.router_aux_loss_coef)
            notes += [end_note] if end_note else []
            notes += [f"extended after step {step}: {text}" for at, text in extended if at == step]
            notes += remarks(config, total_steps, parameters, weights)
            progress.announce(config, data.report, state, shard, engine.device, parameters, notes)
            sinks = [metrics.write, progress.show, *callbacks]
        barrier()

        def on_record(record: loop.Record) -> None:
            for sink in sinks:
                sink(record)

        def manifest() -> Manifest:
            if shard.is_main:
                _write_report(folder, data)  # a stream's report grows
            stage, now = zero_stage(config.deepspeed, shard.world_size), copy.deepcopy(state)
            return Manifest(now, made_with, shard.world_size, stage, owned.life, versions(), files={})

        saver = Saver(
            engine,
            checkpoints,
            shard,
            Keep(config.train.save_total_limit, config.train.save_permanent_steps),
            Agreement(),
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
            if shard.is_main:
                print_line(stopping.standing())
            raise stopping.StoppedError
        if config.train.export:
            export_model(engine, tokenizer, config, folder, shard, state)


def is_exported(config: Config, folder: Path) -> bool:
    """Whether what a run exports at its end is there, and newer than the checkpoint that it is made of."""
    wanted = [(config.train.export, "model"), (config.train.export_merged, "merged")]
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    made = (newest / MANIFEST).stat().st_mtime
    paths = [folder / name for is_wanted, name in wanted if is_wanted]
    return all(path.is_dir() and path.stat().st_mtime >= made for path in paths)


def _write_report(folder: Path, data: Data) -> None:
    (folder / "data_report.json").write_text(json.dumps(data.report, indent=2) + "\n")


Extension = tuple[int, str]
"""The step at which a run was extended, and what changed."""


def _extensions(folder: Path, chosen: Chosen | None, made_with: Mapping[str, Any]) -> list[Extension]:
    """The earlier extensions of the run, and the one of now if it is extended."""
    path = folder / "run.json"
    found = json.loads(path.read_text()).get("extended", []) if chosen and path.is_file() else []
    extended: list[Extension] = [(at, text) for at, text in found]
    if chosen is not None:
        before = chosen.manifest.identity
        changes = [
            f"{key} {before[key]} -> {made_with[key]}" for key in LENGTH if before[key] != made_with[key]
        ]
        extended += [(chosen.manifest.state.step, ", ".join(changes))] if changes else []
    return extended


def _describe_run(
    folder: Path,
    config: Config,
    command: str,
    shard: Shard,
    total_steps: int,
    end_of_turn: int | None,
    extended: Sequence[Extension],
) -> None:
    """Write config.yaml and run.json: the command, the length of the run, the versions, the hardware."""
    (folder / "config.yaml").write_text(dump(config))
    on_gpu = torch.cuda.is_available()
    run = {
        "command": command,
        "total_steps": total_steps,
        "end_of_turn": end_of_turn,
        "world_size": shard.world_size,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "host_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
        "started": time.time(),
        "extended": extended,
    }
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")


def versions() -> dict[str, str]:
    """The versions of this package and of those that decide its numbers."""
    return {
        "madpo": version("madpo"),
        "torch": torch.__version__,  # with its build, which a wheel's metadata may leave out
        **{name: version(name) for name in ("deepspeed", "transformers", "datasets")},
    }
