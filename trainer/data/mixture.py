"""The groups of a split, from one data set or from a mixture of several."""

from __future__ import annotations

from typing import Any

import datasets
import xxhash
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.report import total_report
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
) -> tuple[GroupDataset, dict[str, dict[str, Any]]]:
    """The training or the held-out groups, and for each part a report of what was read, cut and dropped.

    The first report is of all parts together. The parts of a mixture stand one after another, each tokenised
    and cached as if it were alone; a held-out split is taken whole. Raises UserError as `load_groups` does,
    and if no split is named.
    """
    if data.datasets is None:
        split = test_split(data) if held_out else data.dataset_train_split
        if split is None:
            named = data.dataset_test_split or "null"
            raise UserError(
                f"data.dataset_test_split: {named} leaves nothing to evaluate on; make a folder of "
                "train.jsonl and test.jsonl the data set, or name a split that it has"
            )
        groups, report = load_groups(data, split, tokenizer, supervised, known_tokens=known_tokens)
        return groups, {split: report}
    role = "test" if held_out else "train"
    parts: list[GroupDataset] = []
    reports: dict[str, dict[str, Any]] = {}
    identity: list[tuple[str, float]] = []
    for number, part in enumerate(data.datasets, 1):
        split = part.test_split if held_out else part.split
        if split is None:
            continue
        fraction = 1.0 if held_out else part.fraction
        groups, report = load_groups(
            data.alone(part), split, tokenizer, supervised, fraction, known_tokens=known_tokens
        )
        parts.append(groups)
        identity.append((groups.fingerprint, fraction))
        reports[f"{role} {number}"] = {**report, "fraction": fraction}
    if not parts:
        raise UserError("data.datasets: name the split to evaluate on, as test_split of at least one part")
    name = " + ".join(groups.name for groups in parts)
    table = datasets.concatenate_datasets([groups.table for groups in parts])
    fingerprint = f"mixture-{xxhash.xxh3_128_hexdigest(repr(identity).encode())}"
    total = total_report(name, list(reports.values()))
    return GroupDataset(table, name, fingerprint), {role: total, **reports}
