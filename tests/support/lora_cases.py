"""Runs with adapters: configs made of other configs, and adapters as peft stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from harness import make_config, save_model, write_pairs

from madpo.trainer.config.schema import Config
from madpo.trainer.stages.train import run_training

STAGE_2 = {"zero_optimization": {"stage": 2}}


def adapter_config(folder: Path, tokenizer: Path, pairs: int, **sections: Any) -> Config:
    """A run that puts a new adapter on a tiny model, with data of its own in the folder."""
    base = save_model(folder / "base", tokenizer, seed=1)
    write_pairs(folder / "pairs" / "train.jsonl", pairs)
    write_pairs(folder / "pairs" / "test.jsonl", 11, seed=9)
    tree = {
        "model": {"model_name_or_path": str(base)},
        "peft": {"lora_r": 4, "lora_alpha": 8},
        "data": {"dataset_name": str(folder / "pairs"), "dataset_test_split": "test"},
    }
    return make_config(folder, {**tree, **sections})


def changed(config: Config, **sections: Any) -> Config:
    tree = config.model_dump(by_alias=True)
    for section, values in sections.items():
        merge = isinstance(values, dict) and section != "objective"
        tree[section] = {**(tree[section] or {}), **values} if merge else values
    return Config.model_validate(tree)


def train(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")


def stored_adapter(folder: Path, base: Path, tokenizer: Path, **options: Any) -> Path:
    """An adapter as peft saves it, of weights that are nowhere zero."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(5)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    model: Any = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder
