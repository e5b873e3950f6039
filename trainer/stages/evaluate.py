"""Evaluate a model on the held-out split, without training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from madpo.trainer import checkpoint, dist, loop
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data, weighed
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.reference.cached import with_reference
from madpo.trainer.reports.progress import metrics_table
from madpo.trainer.stages.quantiles import resolve_quantiles
from madpo.trainer.stages.start_engine import check_data_fits, start_engine
from madpo.trainer.state import TrainState


def run_evaluation(config: Config) -> None:
    """Evaluate the newest checkpoint of `output_dir`, or the starting model if there is none.

    Writes `evaluation.json` into the run folder and prints a table. Raises UserError.
    """
    folder = Path(config.output_dir)
    stored = checkpoint.stored_objective(folder / "checkpoints") or {}
    if config.objective.quantiles and stored.get("loss_type") == config.objective.loss_type:
        # The thresholds that the run was trained with, whatever data is evaluated now.
        params = type(config.objective).model_validate(stored)
        config = config.model_copy(update={"objective": params})
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, training=False)
    shard = dist.init(config.launch.timeout_minutes)
    config = resolve_quantiles(config, data, tokenizer, shard)
    data = weighed(data, config)
    data, _ = with_reference(config, data, tokenizer, shard, training=False)
    assert data.held_out is not None
    tag = checkpoint.latest(folder / "checkpoints", checkpoint.model_identity(config, shard))
    engine = start_engine(config, tokenizer, training=tag is not None)
    check_data_fits(replace(data, train=None), config, engine)
    state = checkpoint.load(engine, folder / "checkpoints", tag) if tag else TrainState()
    record = loop.evaluate(config, engine, data.held_out, shard, state.memory).record
    if shard.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        record = {name: value for name, value in record.items() if not name.startswith("eval_perf/")}
        result = {"model": tag or config.model.model_name_or_path, **record}
        target = folder / "evaluation.json"
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(metrics_table({str(result["model"]): record}))
        print(f"evaluation {target}", flush=True)
    engine.release()
