"""The data of a run: read -> fit -> merge -> weigh -> source.

    read     the groups of a split, from one data set or a mixture, without the fold that is left out
    fit      add mismatched completions if the objective needs them; check what it needs and the token budget
    merge    join groups that share a prompt (`data.merge_prompts`)
    weigh    drop what is light (`data.min_weight`), draw groups by weight (`data.sampling`), skip weight 0
    source   the training groups in the order of `data.order`

`load_data` does all but weighing, which comes later, in `weighed`: weights may depend on quantiles of the
margins, found once the data is there. Each of fit, merge and weigh may lay a view over the groups. Views lie
on each other in this order only, each at most once except the last (SelectedDataset in place of
TrimmedDataset where the loss has other items than edges):

    GroupDataset <- MismatchedDataset <- MergedDataset <- TrimmedDataset (dropped) <- TrimmedDataset (skipped)

Mismatched completions come from other examples, so they are added before examples are joined. Merging reads
the table of its groups, so nothing below it may join or drop any. Trimming takes edges as it finds them.

A stream is fitted and weighed block by block, and never merged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.schema import Config
from madpo.trainer.data.block_reader import open_reader
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.folds import without_fold
from madpo.trainer.data.groups import TabledGroups, TokenDataset, check_groups
from madpo.trainer.data.mixture import has_held_out, load_split
from madpo.trainer.data.report import UNSCORED, Report, Reports, held_out_in_training
from madpo.trainer.data.stream import Stream
from madpo.trainer.data.training_source import DatasetSource, TrainingSource
from madpo.trainer.data.views.merged_prompts import MergedDataset, merge_prompts, repeated_prompts
from madpo.trainer.data.views.mismatched import MismatchedDataset
from madpo.trainer.data.views.weighed import draw_by_weight, drop_light, skip_weightless
from madpo.trainer.errors import UserError
from madpo.trainer.objectives.base import Need
from madpo.trainer.objectives.build import BoundObjective


@dataclass(frozen=True)
class Data:
    train: TokenDataset | None  # None also for a stream
    held_out: TokenDataset | None
    source: TrainingSource | None  # of the training groups
    held_out_report: Reports
    objective: BoundObjective

    @property
    def report(self) -> dict[str, Report]:
        """split -> what was read, cut and dropped; of a stream, so far."""
        read = {**(self.source.report() if self.source else {}), **self.held_out_report()}
        return told(read, self.objective)


def load_data(
    config: Config, tokenizer: PreTrainedTokenizerBase, training: bool, known_tokens: int | None = None
) -> Data:
    """Read, fit and merge the splits that the config names. Raises UserError for data that cannot serve the
    objective, or that has a token which is not among the `known_tokens` of the model.

    Evaluation reads the training split too if a threshold is a quantile of its margins.
    """
    data, supervised = config.data, config.bound_objective.supervised
    train, held_out, source = None, None, None
    held_out_report: Reports = dict
    trained: GroupDataset | None = None
    if training and data.streaming:
        source = _stream(config, tokenizer, known_tokens)
    elif training or config.objective.quantiles:
        trained, report = training_groups(config, tokenizer, known_tokens)
        train = merged(fitted(trained, config), config)
        source = DatasetSource(train, config.seed, data.order, report_of_merged(train, report))
    if not training or has_held_out(data):
        groups, report = load_split(data, True, tokenizer, supervised, known_tokens)
        held_out = merged(fitted(groups, config), config)
        held_out_report = report_of_merged(held_out, report)
        if trained is not None:
            tables = trained.table, groups.table
            held_out_report = _with_totals(held_out_report, lambda: held_out_in_training(*tables))
    if held_out is None and config.train.eval_steps is not None:
        raise UserError(
            "train.eval_steps: there is nothing to evaluate on; set data.dataset_test_split, or null"
        )
    return Data(train, held_out, source, held_out_report, config.bound_objective)


def weighed(data: Data, config: Config) -> Data:
    """The data seen through the weights of its pairs or completions, and a new source of the training groups.

    What is held out and has weight 0 is skipped. Of the training groups, light ones are dropped first if the
    config says so; then groups are drawn by weight, or what has weight 0 is skipped. Quantile thresholds must
    be numbers by now. Raises UserError if the config asks for weights and there are none, or nothing is left.
    """
    objective = config.bound_objective
    held_out = None if data.held_out is None else skip_weightless(data.held_out, objective)
    if data.train is None:
        return replace(data, held_out=held_out)
    assert data.source is not None
    train, report, draws = data.train, data.source.report, None
    if config.data.min_weight is not None:
        train, dropped = drop_light(train, objective, config.data.min_weight)
        report = _with_totals(report, lambda: dropped)
    if config.data.sampling == "weight":
        train, draws = draw_by_weight(train, objective)
    else:
        train = skip_weightless(train, objective)
    source = DatasetSource(train, config.seed, config.data.order, report, draws)
    return Data(train, held_out, source, data.held_out_report, objective)


def training_groups(
    config: Config, tokenizer: PreTrainedTokenizerBase, known_tokens: int | None = None
) -> tuple[GroupDataset, Reports]:
    """The training groups without the fold that is left out, and the reports of `load_split`, the total
    without the fold too. Raises UserError."""
    data = config.data
    supervised = config.bound_objective.supervised
    groups, report = load_split(data, False, tokenizer, supervised, known_tokens)
    if data.folds is None or data.fold is None:
        return groups, report
    groups = without_fold(groups, data.folds, data.fold)
    tokens = int(groups.counts.lengths.sum())
    numbers = {"groups": len(groups), "tokens": tokens, "without_fold": data.fold}
    return groups, _with_totals(report, lambda: numbers)


def fitted(groups: GroupDataset, config: Config) -> TabledGroups:
    """The groups as the objective takes them. Raises UserError if they cannot serve it."""
    objective = config.bound_objective
    view: TabledGroups = groups
    if Need.MISMATCHED in objective.needs:
        view = MismatchedDataset(groups, config.seed, config.data.max_length)
    check_groups(view, objective, config.train.row_tokens, config.model.prefix_sharing)
    problem = config.objective.problem_with(view.margins)
    if problem:
        raise UserError(f"{view.name}: {problem}")
    return view


def merged(groups: TabledGroups, config: Config) -> TokenDataset:
    """The groups with those of one prompt joined, if the config says so.

    A joined group has no more tokens than a pair may have. Every micro-batch that holds pairs can hold it, so
    the groups do not depend on `train.micro_batch_tokens`, which a continued run may change.
    """
    if not config.data.merge_prompts:
        return groups
    return merge_prompts(groups, config.bound_objective, most_tokens=2 * config.data.max_length)


def report_of_merged(groups: TokenDataset, reports: Reports) -> Reports:
    """The reports with the numbers of the merged groups; or with what merging would save."""
    return _with_totals(
        reports, lambda: groups.report if isinstance(groups, MergedDataset) else repeated_prompts(groups)
    )


def _with_totals(reports: Reports, numbers: Callable[[], Report]) -> Reports:
    """The reports with these numbers in the first one, which is of all parts together."""

    @cache
    def with_numbers() -> dict[str, Report]:
        own = reports()
        total = next(iter(own))
        return own | {total: own[total] | numbers()}

    return with_numbers


def told(reports: dict[str, Report], objective: BoundObjective) -> dict[str, Report]:
    """The reports without what means nothing to the objective: a reward model reads its score off the last
    token of a completion, so that no token is left out of training."""
    if not objective.is_reward_model:
        return reports
    return {
        name: {
            **{key: value for key, value in report.items() if key != UNSCORED},
            "where": {key: value for key, value in report["where"].items() if key != UNSCORED},
        }
        for name, report in reports.items()
    }


def first_groups(data: Data) -> TokenDataset | None:
    """The training groups, of a stream those of its first block; None if there are none."""
    return data.source.first() if isinstance(data.source, Stream) else data.train


def _stream(config: Config, tokenizer: PreTrainedTokenizerBase, known_tokens: int | None) -> Stream:
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
        check=lambda groups: skip_weightless(fitted(groups, config), objective),
        known_tokens=known_tokens,
    ).opened()
