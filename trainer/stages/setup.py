"""What every stage starts with: tokenizer, data, model, engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from madpo.trainer.config import Config
from madpo.trainer.data.dataset import GroupDataset, load_groups
from madpo.trainer.engine import build_engine, deepspeed_config
from madpo.trainer.model.load import build_module
from madpo.trainer.model.partition import partitioned_loading


@dataclass(frozen=True)
class Data:
    train: GroupDataset | None
    held_out: GroupDataset | None
    report: dict[str, Any]  # split -> what was read, cut and dropped


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, training: bool) -> Data:
    """The splits that the config names. Raises ValueError for data that cannot serve the objective."""
    splits = {"train": config.data.dataset_train_split} if training else {}
    if config.data.dataset_test_split is not None:
        splits["held_out"] = config.data.dataset_test_split
    elif not training:
        raise ValueError("data.dataset_test_split: name the split to evaluate on")
    loaded: dict[str, GroupDataset] = {}
    report: dict[str, Any] = {}
    for role, split in splits.items():
        loaded[role], report[split] = load_groups(config.data, split, tokenizer)
        loaded[role].require(config.objective_entry, config.objective.loss_type)
    return Data(loaded.get("train"), loaded.get("held_out"), report)


def start_engine(config: Config, tokenizer: PreTrainedTokenizerBase, training: bool) -> Any:
    """The engine around policy, reference and head."""
    with partitioned_loading(deepspeed_config(config, training)):
        module = build_module(config, tokenizer)
    return build_engine(config, module, training)
