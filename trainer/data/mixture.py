"""The groups of a split, from one data set or from a mixture of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

import datasets
import xxhash
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.report import Report, Reports, total_report
from madpo.trainer.data.source import test_split
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.errors import UserError


def has_held_out(data: DataConfig) -> bool:
    """Whether the data set, or a part of the mixture, has a held-out split."""
    return data.may_hold_out and (data.datasets is not None or test_split(data) is not None)


def load_split(
    data: DataConfig,
    held_out: bool,
    tokenizer: PreTrainedTokenizerBase,
    supervised: bool = False,
    known_tokens: int | None = None,
) -> tuple[GroupDataset, Reports]:
    """The training or the held-out groups, and for each part a report of what was read, cut and dropped.

    The parts of a mixture stand one after another, each tokenised
    and cached as if it were alone; a held-out split is taken whole. Raises UserError as `load_groups` does,
    and if no split is named.
    """
    described = parts_of(data, held_out)
    parts: list[GroupDataset] = []
    reports: dict[str, Callable[[], Report]] = {}
    for part in described:
        groups, report = load_groups(
            part.data, part.split, tokenizer, supervised, part.fraction, known_tokens
        )
        parts.append(groups)
        reports[part.label] = report
    if data.datasets is None:
        return parts[0], partial(_all_of, reports)
    identity = [(own.fingerprint, part.fraction) for own, part in zip(parts, described, strict=True)]
    fingerprint = f"mixture-{xxhash.xxh3_128_hexdigest(repr(identity).encode())}"
    table = datasets.concatenate_datasets([groups.table for groups in parts])
    name = " + ".join(groups.name for groups in parts)
    together = cache(lambda: with_total(name, described, _all_of(reports)))
    return GroupDataset(table, name, fingerprint), together


def _all_of(reports: Mapping[str, Callable[[], Report]]) -> dict[str, Report]:
    return {label: report() for label, report in reports.items()}


class Part(NamedTuple):
    """A split to read, of one data set, and how reports call it."""

    label: str
    data: DataConfig
    split: str
    fraction: float


def parts_of(data: DataConfig, held_out: bool) -> list[Part]:
    """The split to train on, or to hold out, of every data set. Raises UserError if there is none."""
    if data.datasets is None:
        split = test_split(data) if held_out else data.dataset_train_split
        if split is None:
            named = data.dataset_test_split or "null"
            raise UserError(
                f"data.dataset_test_split: {named} leaves nothing to evaluate on; give the data set "
                "as a folder with train.jsonl and test.jsonl, or name a split that it has"
            )
        return [Part(split, data, split, 1.0)]
    role = "test" if held_out else "train"
    parts = []
    for number, part in enumerate(data.datasets, 1):
        split = part.test_split if held_out else part.split
        if split is not None:
            fraction = 1.0 if held_out else part.fraction
            parts.append(Part(f"{role} {number}", data.alone(part), split, fraction))
    if not parts:
        raise UserError("data.datasets: name the split to evaluate on, as test_split of at least one part")
    return parts


def with_total(name: str, parts: Sequence[Part], reports: dict[str, Report]) -> dict[str, Report]:
    """The reports of a mixture's parts, after one of all of them together."""
    role = parts[0].label.split()[0]
    reports = {part.label: {**reports[part.label], "fraction": part.fraction} for part in parts}
    return {role: total_report(name, list(reports.values())), **reports}
