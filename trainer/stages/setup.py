"""What every stage starts with: tokenizer, data, model, engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from madpo.trainer.config import Config
from madpo.trainer.data.dataset import GroupDataset, load_groups
from madpo.trainer.data.folds import without_fold
from madpo.trainer.data.mismatched import MismatchedDataset
from madpo.trainer.engine import build_engine, deepspeed_config
from madpo.trainer.errors import UserError
from madpo.trainer.model.load import build_module
from madpo.trainer.model.partition import partitioned_loading
from madpo.trainer.model.policy import refuse_unless_head_is_known, refuse_unless_packing_is_exact


@dataclass(frozen=True)
class Data:
    train: GroupDataset | None
    held_out: GroupDataset | None
    report: dict[str, Any]  # split -> what was read, cut and dropped


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, training: bool) -> Data:
    """The splits that the config names. Raises ValueError for data that cannot serve the objective.

    Evaluation reads the training split too if a threshold is a quantile of it.
    """
    entry = config.objective_entry
    wanted = training or config.objective.quantiles
    splits = {"train": config.data.dataset_train_split} if wanted else {}
    if config.data.dataset_test_split is not None:
        splits["held_out"] = config.data.dataset_test_split
    elif not training:
        raise UserError("data.dataset_test_split: name the split to evaluate on")
    loaded: dict[str, GroupDataset] = {}
    report: dict[str, Any] = {}
    for role, split in splits.items():
        groups, report[split] = load_groups(config.data, split, tokenizer, entry.supervised)
        if role == "train" and config.data.folds is not None and config.data.fold is not None:
            groups = without_fold(groups, config.data.folds, config.data.fold)
            kept = {"groups": len(groups), "tokens": int(groups.lengths.sum())}
            report[split] = {**report[split], **kept, "without_fold": config.data.fold}
        if "mismatched" in entry.needs:
            groups = MismatchedDataset(groups, config.seed, config.data.max_length)
        groups.require(entry, config.objective.loss_type, config.train.micro_batch_tokens)
        problem = config.objective.problem_with(groups.margins)
        if problem:
            raise UserError(f"{groups.name}: {problem}")
        if role == "train":
            groups.ease(config.data.order)
        loaded[role] = groups
    return Data(loaded.get("train"), loaded.get("held_out"), report)


def start_engine(config: Config, tokenizer: PreTrainedTokenizerBase, training: bool) -> Any:
    """The engine around policy, reference and head."""
    with partitioned_loading(deepspeed_config(config, training)):
        module = build_module(config, tokenizer)
    engine = build_engine(config, module, training)
    for model in (module.policy, module.reference):
        if model is not None:
            refuse_unless_packing_is_exact(model, engine.device)
            if "scores" not in config.objective_entry.needs:
                refuse_unless_head_is_known(model, engine.device)
    return engine
