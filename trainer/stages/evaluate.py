"""Evaluate a model on the held-out split, without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from madpo.trainer import dist, loop
from madpo.trainer.checkpoints.choose import choose
from madpo.trainer.checkpoints.identity import model_identity
from madpo.trainer.checkpoints.load import load, stored_objective
from madpo.trainer.config.locate import located
from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import load_data, weighed
from madpo.trainer.files import write_object
from madpo.trainer.model.build import known_tokens
from madpo.trainer.model.content import contents_of_models
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.reference.cached import with_reference
from madpo.trainer.reports.progress import metrics_table, print_findings
from madpo.trainer.run_folder import check_trained
from madpo.trainer.stages.quantiles import resolve_quantiles
from madpo.trainer.stages.start_engine import check_data_fits, start_engine
from madpo.trainer.state import TrainState


def run_evaluation(config: Config, base: bool = False) -> dict[str, Any]:
    """Evaluate the newest checkpoint of `output_dir`, or with `base` the model that training starts from.

    Writes `evaluation.json` into the run folder, prints a table, and returns on all ranks what it wrote:
    `model` (the checkpoint, or the starting model's name) and the metrics. Raises UserError.
    """
    config, folder = located(config), Path(config.output_dir)
    if not base:
        check_trained(folder, "evaluate")
    stored = stored_objective(folder / "checkpoints") or {}
    if config.objective.quantiles and stored.get("loss_type") == config.objective.loss_type:
        # The thresholds that the run was trained with, whatever data is evaluated now.
        params = type(config.objective).model_validate(stored)
        config = config.model_copy(update={"objective": params})
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, False, known_tokens(config, tokenizer))
    shard = dist.init(config.launch.timeout_minutes, config.launch.start_timeout_minutes)
    if shard.is_main:
        print_findings(data.held_out_report())
    config = resolve_quantiles(config, data, tokenizer, shard)
    data = weighed(data, config)
    data, _ = with_reference(config, data, tokenizer, shard, training=False)
    assert data.held_out is not None
    made_with = model_identity(config, shard, {} if base else contents_of_models(config, shard))
    chosen = None if base else choose(folder / "checkpoints", made_with, shard)
    engine = start_engine(config, tokenizer, training=chosen is not None)
    check_data_fits(replace(data, train=None), config, engine)
    state = load(engine, chosen) if chosen else TrainState()
    record = loop.evaluate(config, engine, data.held_out, shard, state.memory).record
    record = {name: value for name, value in record.items() if not name.startswith("eval_perf/")}
    result = {"model": chosen.folder.name if chosen else config.model.model_name_or_path, **record}
    if shard.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "evaluation.json"
        write_object(target, result)
        print(metrics_table({str(result["model"]): record}))
        print(f"evaluation {target}", flush=True)
    engine.release()
    return result
