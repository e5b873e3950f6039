"""Runs of a tiny model on two dozen pairs, and what they leave behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from harness import make_config, save_model, write_pairs

from madpo.trainer.checkpoints.folders import checkpoints_in, step_of
from madpo.trainer.config.schema import Config
from madpo.trainer.stages.evaluate import run_evaluation
from madpo.trainer.stages.export import run_export
from madpo.trainer.stages.train import run_training


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def config_of(folder: Path, tokenizer: Path) -> Config:
    model = save_model(folder / "start", tokenizer, seed=1)
    write_pairs(folder / "pairs" / "train.jsonl", 21)
    write_pairs(folder / "pairs" / "test.jsonl", 11, seed=9)
    return make_config(
        folder,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(folder / "pairs"), "dataset_test_split": "test"},
            "objective": {"loss_type": "madpo", "tau": 2.0},
            "optim": {"lr": 3e-3, "warmup_steps": 2},
            "train": {"num_train_epochs": 2, "eval_steps": 3, "save_steps": 3},
        },
    )


def changed(config: Config, **sections: Any) -> Config:
    tree = config.model_dump(by_alias=True)
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return Config.model_validate(tree)


def with_sections(config: Config, objective: dict[str, Any], **sections: Any) -> Config:
    """Return the config with another objective; `changed` would keep the old one's parameters."""
    tree = changed(config, **sections).model_dump(by_alias=True)
    return Config.model_validate({**tree, "objective": objective})


def train(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")


ALONE: dict[str, Any] = {"deepspeed": {"zero_optimization": {}}, "train": {"bf16": True}}
"""For one rank, which then uses ZeRO-2."""
SHORT = {"max_steps": 4, "eval_steps": 4, "save_steps": 2}
"""Three steps are an epoch."""


def cut_back(folder: Path, step: int) -> None:
    """Leave a run's folder as if it had been killed after the checkpoint of that step."""
    for checkpoint in checkpoints_in(folder / "checkpoints"):
        if step_of(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


def cut_off(run: Config, folder: Path, step: int) -> Config:
    """A copy of a finished run in `folder`, as if it had been killed after the checkpoint of that step."""
    shutil.copytree(run.output_dir, folder)
    shutil.rmtree(folder / "model", ignore_errors=True)
    cut_back(folder, step)
    return run.model_copy(update={"output_dir": str(folder)})


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in dicts, lists and tuples, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for child in children for tensor in tensors_in(child)]


def model_bytes(config: Config) -> bytes:
    return (Path(config.output_dir) / "model" / "model.safetensors").read_bytes()


def evaluate_and_export(shard, config: Config) -> None:
    run_evaluation(config)
    run_export(config)


def evaluate_only(shard, config: Config, base: bool = False) -> None:
    run_evaluation(config, base)
