"""Train, from the newest checkpoint or from the start: any objective, any number of ranks."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import torch

from madpo.trainer import checkpoint, dist, loop
from madpo.trainer.config.schema import Config, dump
from madpo.trainer.data.training_data import Data, load_data, weighed
from madpo.trainer.dist import Shard, barrier
from madpo.trainer.metrics import MetricsFile
from madpo.trainer.model.expert_balance import expert_notes
from madpo.trainer.model.freeze import count_parameters
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.pair_margins import PairMargins, StoredPairs, write_pairs
from madpo.trainer.reference.cached import check_policy_fits, reference_notes, with_reference
from madpo.trainer.reports.progress import Progress
from madpo.trainer.run_folder import claim
from madpo.trainer.schedule import run_length
from madpo.trainer.stages.export import export_model
from madpo.trainer.stages.quantiles import resolve_quantiles
from madpo.trainer.stages.start_engine import check_data_fits, start_engine
from madpo.trainer.state import TrainState


def run_training(config: Config, command: str) -> None:
    """Train, evaluate, checkpoint and export into `output_dir`; continue a run that is already there.

    Data is read before the ranks join, because tokenising may take longer than a collective's timeout, and
    may fork. Raises UserError for a config, model or data set that cannot be trained.
    """
    folder = Path(config.output_dir)
    checkpoints = folder / "checkpoints"
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, training=True)
    shard = dist.init(config.launch.timeout_minutes)
    lock = claim(folder, shard)
    config = resolve_quantiles(config, data, tokenizer, shard)
    data = weighed(data, config)
    assert data.source is not None
    identity = checkpoint.identity(config, shard, data.source.content)
    tag = checkpoint.latest(checkpoints, identity)
    data, cached = with_reference(config, data, tokenizer, shard, training=True)
    source = data.source
    assert source is not None
    engine = start_engine(config, tokenizer, training=True)
    check_data_fits(data, config, engine)
    state = checkpoint.load(engine, checkpoints, tag) if tag else TrainState()
    if cached is not None:
        check_policy_fits(config, engine, source, shard, cached, is_fresh=tag is None)

    with ExitStack() as cleanup:
        sinks: list[Callable[[loop.Record], None]] = []
        if shard.is_main:
            total_steps = run_length(config, source.num_groups).total_steps
            _describe_run(folder, config, command, shard, total_steps)
            _write_report(folder, data)
            metrics = MetricsFile(folder, state.step)
            cleanup.callback(metrics.close)
            progress = Progress(total_steps)
            cleanup.callback(progress.close)
            parameters = count_parameters(engine.module.policy)
            notes = [*engine.module.notes, *reference_notes(config, engine.module, source, cached)]
            notes += expert_notes(engine.module.policy, config.model.router_aux_loss_coef)
            progress.announce(config, data.report, state, shard, engine.device, parameters, notes)
            sinks = [metrics.write, progress.show]
        barrier()

        def on_record(record: loop.Record) -> None:
            for sink in sinks:
                sink(record)

        def on_save() -> None:
            keep, moves = config.train.save_total_limit, config.model.sync_ref_model
            checkpoint.save(engine, checkpoints, state, identity, shard, keep, with_reference=moves)
            if shard.is_main:
                _write_report(folder, data)  # a stream's report grows

        def on_pairs(step: int, pairs: PairMargins) -> None:
            if shard.is_main and data.held_out is not None:
                write_pairs(folder, StoredPairs(step, data.held_out.fingerprint, pairs))

        loop.train(config, engine, source, data.held_out, shard, state, on_record, on_save, on_pairs)

    if config.train.export:
        export_model(engine, tokenizer, config, folder, shard, state)
    engine.release()
    lock.release()


def _write_report(folder: Path, data: Data) -> None:
    (folder / "data_report.json").write_text(json.dumps(data.report, indent=2) + "\n")


def _describe_run(folder: Path, config: Config, command: str, shard: Shard, total_steps: int) -> None:
    """Write config.yaml and run.json: the command, the length of the run, the versions, the hardware."""
    (folder / "config.yaml").write_text(dump(config))
    on_gpu = torch.cuda.is_available()
    run = {
        "command": command,
        "total_steps": total_steps,
        "world_size": shard.world_size,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "host_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {
            name: version(name) for name in ("madpo", "torch", "deepspeed", "transformers", "datasets")
        },
        "started": time.time(),
    }
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")
