"""The data of a run, from files to feed: read, made to fit the objective, merged, weighed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.schema import Config
from madpo.trainer.data.block_reader import open_reader
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.folds import without_fold
from madpo.trainer.data.groups import TabledGroups, TokenDataset, check_groups
from madpo.trainer.data.mixture import load_split
from madpo.trainer.data.stream import Stream
from madpo.trainer.data.training_source import DatasetSource, TrainingSource
from madpo.trainer.data.views.merged_prompts import MergedDataset, merge_prompts, repeated_prompts
from madpo.trainer.data.views.mismatched import MismatchedDataset
from madpo.trainer.data.views.trimmed import draw_by_weight, drop_light, edge_weights, skip_weightless
from madpo.trainer.errors import UserError
from madpo.trainer.objectives.base import Need


@dataclass(frozen=True)
class Data:
    train: TokenDataset | None  # None also for a stream
    held_out: TokenDataset | None
    source: TrainingSource | None  # of the training groups
    held_out_report: dict[str, Any]

    @property
    def report(self) -> dict[str, Any]:
        """split -> what was read, cut and dropped, of a stream so far."""
        return {**(self.source.report() if self.source else {}), **self.held_out_report}


def load_data(config: Config, tokenizer: PreTrainedTokenizerBase, training: bool) -> Data:
    """The splits that the config names. Raises UserError for data that cannot serve the objective.

    Evaluation reads the training split too if a threshold is a quantile of it.
    """
    data, supervised = config.data, config.bound_objective.supervised
    train, held_out, source, held_out_report = None, None, None, {}
    if training and data.streaming:
        source = _stream(config, tokenizer)
    elif training or config.objective.quantiles:
        groups, report = training_groups(config, tokenizer)
        train = merged(_made_fit(groups, config), config)
        source = DatasetSource(train, config.seed, data.order, report_of_merged(train, report))
    if data.has_test_split or not training:
        groups, held_out_report = load_split(data, True, tokenizer, supervised)
        held_out = merged(_made_fit(groups, config), config)
        held_out_report = report_of_merged(held_out, held_out_report)
    return Data(train, held_out, source, held_out_report)


def training_groups(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[GroupDataset, dict[str, dict[str, Any]]]:
    """The training groups without the fold that is left out, and the report of `load_split`, whose first
    entry, of all parts together, has the numbers without it. Raises UserError."""
    data = config.data
    groups, report = load_split(data, False, tokenizer, config.bound_objective.supervised)
    if data.folds is None or data.fold is None:
        return groups, report
    groups = without_fold(groups, data.folds, data.fold)
    kept = {"groups": len(groups), "tokens": int(groups.counts.lengths.sum()), "without_fold": data.fold}
    total = next(iter(report))
    return groups, report | {total: report[total] | kept}


def merged(groups: TabledGroups, config: Config) -> TokenDataset:
    """The groups with the rows of a prompt in one, if the config says so.

    They have no more tokens than a pair may have: every micro-batch that holds pairs holds them, so that
    they do not depend on `train.micro_batch_tokens`, which may change from run to continuation.
    """
    if not config.data.merge_prompts:
        return groups
    return merge_prompts(groups, config.bound_objective, most_tokens=2 * config.data.max_length)


def weighed(data: Data, config: Config) -> Data:
    """The data seen through the weights of its pairs, whose parameters must be numbers by now: what weighs
    nothing is not computed, and of the training groups light pairs are left out, or all drawn by weight, if
    the config says so. Raises UserError if that leaves nothing.
    """
    if config.bound_objective.weight is None:
        return data
    held_out = data.held_out and without_weightless(data.held_out, config)
    if data.train is None:
        return replace(data, held_out=held_out)
    assert data.source is not None
    train, report, draws = data.train, data.source.report(), None
    if config.data.min_weight is not None:
        train, found = drop_light(train, _weights(train, config), config.data.min_weight)
        total = next(iter(report))
        report = report | {total: report[total] | found}
    if config.data.sampling == "weight":
        train, draws = draw_by_weight(train, _weights(train, config))
    else:
        train = without_weightless(train, config)
    source = DatasetSource(train, config.seed, config.data.order, report, draws)
    return Data(train, held_out, source, data.held_out_report)


def without_weightless(groups: TokenDataset, config: Config) -> TokenDataset:
    """The groups without the pairs whose loss the objective multiplies by 0."""
    if config.bound_objective.weight is None:
        return groups
    return skip_weightless(groups, _weights(groups, config))


def _weights(groups: TokenDataset, config: Config) -> np.ndarray:
    return edge_weights(groups, config.bound_objective)


def report_of_merged(groups: TokenDataset, report: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The report, whose first entry is of all parts together, with the numbers of the groups as merged, or
    with what merging them would save."""
    total = next(iter(report))
    found = groups.report if isinstance(groups, MergedDataset) else repeated_prompts(groups)
    return report | {total: report[total] | found}


def _made_fit(loaded: GroupDataset, config: Config) -> TabledGroups:
    """The groups as the objective takes them. Raises UserError if they cannot serve it."""
    objective = config.bound_objective
    groups: TabledGroups = loaded
    if Need.MISMATCHED in objective.needs:
        groups = MismatchedDataset(loaded, config.seed, config.data.max_length)
    budget, shares = config.train.row_tokens, config.model.prefix_sharing
    check_groups(groups, objective, budget, shares)
    problem = config.objective.problem_with(groups.margins)
    if problem:
        raise UserError(f"{groups.name}: {problem}")
    return groups


def _stream(config: Config, tokenizer: PreTrainedTokenizerBase) -> Stream:
    data, train, objective = config.data, config.train, config.bound_objective
    assert train.max_steps is not None
    return Stream(
        open_reader(data, data.dataset_train_split),
        data,
        data.dataset_train_split,
        tokenizer,
        config.seed,
        end=train.max_steps * train.global_batch_size,
        supervised=objective.supervised,
        fewest=2 if Need.MISMATCHED in objective.needs else 1,
        check=lambda groups: without_weightless(_made_fit(groups, config), config),
    )
