"""What every stage starts with: tokenizer, data, model, engine."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from madpo.trainer.config import Config
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.feed import Feed, WholeSet
from madpo.trainer.data.folds import without_fold
from madpo.trainer.data.mismatched import MismatchedDataset
from madpo.trainer.data.mixture import load_split
from madpo.trainer.data.reader import open_reader
from madpo.trainer.data.stream import Stream
from madpo.trainer.engine import build_engine, deepspeed_config
from madpo.trainer.errors import UserError
from madpo.trainer.model.load import build_module
from madpo.trainer.model.partition import partitioned_loading
from madpo.trainer.model.policy import (
    PolicyWithReference,
    refuse_noise,
    refuse_unless_head_is_known,
    refuse_unless_packing_is_exact,
    share_traversal,
)


@dataclass(frozen=True)
class Data:
    train: GroupDataset | None  # None also for a stream
    held_out: GroupDataset | None
    feed: Feed | None  # of the training groups
    held_out_report: dict[str, Any]

    @property
    def report(self) -> dict[str, Any]:
        """split -> what was read, cut and dropped, of a stream so far."""
        return {**(self.feed.report() if self.feed else {}), **self.held_out_report}


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, training: bool) -> Data:
    """The splits that the config names. Raises ValueError for data that cannot serve the objective.

    Evaluation reads the training split too if a threshold is a quantile of it.
    """
    data, supervised = config.data, config.objective_entry.supervised
    train, held_out, feed, held_out_report = None, None, None, {}
    if training and data.streaming:
        feed = _stream(config, tokenizer)
    elif training or config.objective.quantiles:
        groups, report = training_groups(config, tokenizer)
        train = _made_fit(groups, config)
        feed = WholeSet(train, config.seed, data.order, report)
    if data.has_test_split or not training:
        groups, held_out_report = load_split(data, True, tokenizer, supervised)
        held_out = _made_fit(groups, config)
    return Data(train, held_out, feed, held_out_report)


def training_groups(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[GroupDataset, dict[str, dict[str, Any]]]:
    """The training groups without the fold that is left out, and the report of `load_split`, whose first
    entry, of all parts together, has the numbers without it. Raises ValueError."""
    data = config.data
    groups, report = load_split(data, False, tokenizer, config.objective_entry.supervised)
    if data.folds is None or data.fold is None:
        return groups, report
    groups = without_fold(groups, data.folds, data.fold)
    kept = {"groups": len(groups), "tokens": int(groups.lengths.sum()), "without_fold": data.fold}
    total = next(iter(report))
    return groups, report | {total: report[total] | kept}


def _made_fit(groups: GroupDataset, config: Config) -> GroupDataset:
    """The groups as the objective takes them. Raises ValueError if they cannot serve it."""
    entry = config.objective_entry
    if "mismatched" in entry.needs:
        groups = MismatchedDataset(groups, config.seed, config.data.max_length)
    groups.require(entry, config.objective.loss_type, config.train.micro_batch_tokens)
    problem = config.objective.problem_with(groups.margins)
    if problem:
        raise UserError(f"{groups.name}: {problem}")
    return groups


def _stream(config: Config, tokenizer: PreTrainedTokenizerBase) -> Stream:
    data, train, entry = config.data, config.train, config.objective_entry
    assert train.max_steps is not None
    return Stream(
        open_reader(data, data.dataset_train_split),
        data,
        data.dataset_train_split,
        tokenizer,
        config.seed,
        end=train.max_steps * train.global_batch_size,
        supervised=entry.supervised,
        fewest=2 if "mismatched" in entry.needs else 1,
        check=functools.partial(_made_fit, config=config),
    )


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
    quantised = config.peft is not None and config.peft.quantised
    if training and not quantised:  # whose kernels round otherwise in training, without any noise
        refuse_noise(module.policy, engine.device)
    if isinstance(module, PolicyWithReference):
        share_traversal(module, engine.device)
    return engine
