"""The examples of a split -> a table of token groups on disk, tokenised once and cached by content.

Every rank calls `load_groups`. A file lock lets one of them do the work, however long it takes: the others
wait at the lock, not in a collective, which would time out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import xxhash
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data.dataset import GroupDataset, column_of, store_columns, stored_columns
from madpo.trainer.data.known_splits import KnownSplit
from madpo.trainer.data.known_tokens import with_known_tokens
from madpo.trainer.data.long_prompts import is_longer, most_characters
from madpo.trainer.data.order import permutation
from madpo.trainer.data.plain_text import foreign_marks, marks_in_messages, special_spellings, spells_special
from madpo.trainer.data.report import Report, reasons_in, report_of
from madpo.trainer.data.source import Origin, Source, cache_folder, fields_of, open_source, reading
from madpo.trainer.data.split_files import split_files
from madpo.trainer.data.template_keys import unread
from madpo.trainer.data.tokenise import FILLS, TokenGroup, TokenRules, tokenise
from madpo.trainer.errors import DataError, UserError, on_one_line
from madpo.trainer.files import discard_damaged, seal, write_folder_atomically
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.oddities import claims_of, oddities_of
from madpo.trainer.formats.read_row import RowRules, choose_adapter, read_row
from madpo.trainer.formats.text_groups import hash_of_prompt

FORMAT_VERSION = 16
"""Part of the cache key; raise it when the same examples would give other tokens."""

FEATURES = datasets.Features(
    {
        "prompt": datasets.Sequence(datasets.Value("int32")),
        "completions": datasets.Sequence(datasets.Sequence(datasets.Value("int32"))),
        "masks": datasets.Sequence(datasets.Sequence(datasets.Value("bool"))),
        "winners": datasets.Sequence(datasets.Value("int32")),
        "losers": datasets.Sequence(datasets.Value("int32")),
        "margins": datasets.Sequence(datasets.Value("float64")),
        "labels": datasets.Sequence(datasets.Value("int8")),
        "edge_weights": datasets.Sequence(datasets.Value("float64")),
        "completion_weights": datasets.Sequence(datasets.Value("float64")),
        "completion_lengths": datasets.Sequence(datasets.Value("int32")),
        "num_tokens": datasets.Value("int32"),
        "num_completion_tokens": datasets.Value("int32"),
        "num_scored_tokens": datasets.Value("int32"),
        "num_sequences": datasets.Value("int32"),
        "num_edges": datasets.Value("int32"),
        "num_margins": datasets.Value("int32"),
        "num_labels": datasets.Value("int32"),
        "num_weights": datasets.Value("int32"),
        "boundary_cut": datasets.Value("int32"),
        "truncated": datasets.Value("int32"),
        "equal": datasets.Value("int32"),
        "spells_special": datasets.Value("bool"),  # in a conversation, where it becomes the token
        "spelled_in_text": datasets.Value("bool"),  # in plain text, where it stays text
        "foreign_marks": datasets.Sequence(datasets.Value("string")),
        "marks_in_messages": datasets.Sequence(datasets.Value("string")),
        "notes": datasets.Sequence(datasets.Value("string")),
        "unused": datasets.Sequence(datasets.Value("string")),
        "odd": datasets.Sequence(datasets.Value("string")),
        "claims": datasets.Sequence(datasets.Value("int64")),
        "conversational": datasets.Value("bool"),
        "prompt_hash": datasets.Value("int64"),
        "problem": datasets.Value("string"),
        "unreadable": datasets.Value("bool"),
        "row": datasets.Value("int64"),
    }
)


def rules_of(data: DataConfig, supervised: bool = False) -> TokenRules:
    """The rules that the config sets for reading examples and tokenising them."""
    rows = RowRules(data.adapter, data.columns, data.edges, tuple(data.ignore_columns))
    return TokenRules(
        data.max_length,
        data.append_eos,
        supervised,
        data.chat_template_kwargs,
        tuple(data.template_may_drop),
        data.template_date,
        data.train_on,
        data.text_holds_special_tokens,
        rows,
    )


def load_groups(
    data: DataConfig,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    supervised: bool = False,
    fraction: float = 1.0,
    known_tokens: int | None = None,
) -> tuple[GroupDataset, Callable[[], Report]]:
    """The groups of one split, or a fraction of them, and a function that gives the report of what was read,
    cut and dropped, which takes long for millions of rows.

    Raises UserError as `read_table` does, and for a split in which nothing can be trained on; for an example
    that cannot be read, or has a token that is not among the `known_tokens` of the model, unless
    `on_bad_row: drop`.
    """
    origin, read, path = read_table(data, split, tokenizer, supervised)
    table = with_known_tokens(read, stored_columns(path), tokenizer, known_tokens)
    check_readable(origin.where, table, data.on_bad_row)
    usable = usable_rows(table)
    key = path.name if table is read else f"{path.name}, {known_tokens} tokens known"
    taken = usable[share(len(usable), fraction)]
    report = cache(partial(report_of, origin.name, table, taken, origin.where))
    if not len(usable):
        raise DataError(f"{origin.name}: {nothing_left(report(), data)}")
    if not len(taken):
        raise UserError(f"{origin.name}: fraction {fraction:g} of {len(usable)} groups is none; raise it")
    if len(usable) == len(table) and fraction == 1:
        return GroupDataset(table, origin.name, key, stored_columns(path)), report
    return GroupDataset(table.select(taken), origin.name, key), report


def nothing_left(report: Report, data: DataConfig) -> str:
    """What to say of examples none of which can be trained on."""
    rows = report["rows"]
    none = "its only row cannot" if rows == 1 else f"none of {rows} rows can"
    return f"{none} be trained on ({reasons_in(report)}); data.max_length is {data.max_length}"


def read_table(
    data: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, supervised: bool = False
) -> tuple[Origin, datasets.Dataset, Path]:
    """Where a split comes from, the table of FEATURES with a row for each of its examples, and the folder of
    that, whose name is its key.

    Raises UserError for a missing file or split, and for unknown columns.
    """
    folder, rules = cache_folder(data), rules_of(data, supervised)
    with reading(str(data.dataset_name)):
        files = split_files(data, split)
    # Of a data set on the hub no file can be looked at.
    known = KnownSplit(folder, files, groups_key("", tokenizer, rules)) if files else None
    found = known.find() if known else None
    if found is None:
        lock = f"lock-{xxhash.xxh3_64_hexdigest(str(data.dataset_name).encode())}"
        with FileLock(folder / lock):
            found = known.find() if known else None  # as another rank has left it meanwhile
            if found is None:
                facts = known.facts() if known else []
                found = _tokenised(data, split, tokenizer, rules, folder)
                if known:
                    known.note(facts, *found)
    origin, path = found
    table = datasets.load_from_disk(str(path))
    assert isinstance(table, datasets.Dataset)
    return origin, table, path


def _tokenised(
    data: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, rules: TokenRules, folder: Path
) -> tuple[Origin, Path]:
    """Read a split, and make the table of its tokens if the cache has no sound one of this content."""
    source = open_source(data, split, folder)
    key = groups_key(source.fingerprint, tokenizer, rules)
    path = folder / f"groups-{key}"
    with FileLock(folder / f"lock-{key}"):  # the same content may have another name elsewhere
        discard_damaged(path, "tokenising anew")
        if not path.is_dir():
            tokenise_all(source, tokenizer, rules, adapter_in(source, rules), data.dataset_num_proc, path)
    return source.origin, path


def groups_key(fingerprint: str, tokenizer: PreTrainedTokenizerBase, rules: TokenRules) -> str:
    """A hash of the examples and everything that decides their tokens."""
    identity = (FORMAT_VERSION, fingerprint, tokenizer_identity(tokenizer), asdict(rules))
    return xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())


def usable_rows(table: datasets.Dataset) -> np.ndarray:
    """(n,) the rows of the table that can be trained on."""
    return np.flatnonzero(pc.call_function("equal", [table.data.column("problem"), ""]))


def share(
    num_groups: int,
    fraction: float,
) -> np.ndarray:  # (round(fraction * num_groups),)
    """Indices of a fraction of the groups: all of them as often as it has wholes, then a random subset.

    The subset does not depend on the run's seed, and a larger one holds every smaller one.
    """
    whole, rest = divmod(fraction, 1)
    all_of_them = np.tile(np.arange(num_groups), int(whole))
    if not rest:
        return all_of_them
    subset = permutation(num_groups, seed=0, epoch=0)[: round(rest * num_groups)]
    return np.concatenate((all_of_them, np.sort(subset)))


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything in a tokenizer that decides which tokens come out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = (
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items())),
        repr(sorted(tokenizer.special_tokens_map.items())),
        repr(tokenizer.chat_template),
    )
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


UNREAD = {
    "spells_special": False,
    "spelled_in_text": False,
    "foreign_marks": [],
    "marks_in_messages": [],
    "unused": [],
    "odd": [],
    "claims": [],
    "conversational": False,
    "prompt_hash": 0,
    "unreadable": True,
}
"""What is known of the texts of an example that cannot be read."""


@dataclass(frozen=True)
class _RowTokeniser:
    """Example -> row of the table. A class, since several processes need it pickled."""

    tokenizer: PreTrainedTokenizerBase
    rules: TokenRules
    adapter: str
    unit: str  # of the source
    classes: dict[str, Any]  # of the source
    most_characters: int | None  # of a prompt that may fit; None: not known
    spellings: re.Pattern[str] | None  # of special tokens
    added_tokens: frozenset[str]

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        number = row["line"] if self.unit == "line" else index
        template: Any = self.tokenizer.chat_template  # text, or several by name
        try:
            fields = fields_of(row, self.unit, self.classes)
            text = read_row(fields, ADAPTERS[self.adapter], self.rules.rows, self.rules.supervised)
            if text.compared and len(text.completions) < 2 and not self.rules.supervised:
                group = TokenGroup([], [], [], problem="fewer than two scored completions")
            elif is_longer(text.prompt, self.most_characters):
                group = TokenGroup([], [], [], problem=FILLS)  # megabytes would take minutes
            else:
                group = tokenise(text, self.tokenizer, self.rules)
            if len(group.completions) > 1 and not group.edges and not group.problem:
                group = replace(group, problem="no completion is better than another")
            spells = spells_special(text, self.spellings)
            stays_text = not (text.conversational or self.rules.text_holds_special_tokens)
            of_text = {
                "spells_special": spells and text.conversational,
                "spelled_in_text": spells and stays_text,
                "foreign_marks": foreign_marks(text, self.added_tokens),
                "marks_in_messages": marks_in_messages(text),
                "unused": [*text.unused, *unread(text, template, self.rules.template_kwargs)],
                "odd": oddities_of(text, has_prompt=self.adapter != "text"),
                "claims": claims_of(text),
                "conversational": text.conversational,
                "prompt_hash": hash_of_prompt(text),
                "unreadable": False,
            }
        except Exception as error:  # a chat template may raise anything
            if isinstance(error, RecursionError):
                error = UserError("it holds lists or objects that are nested too deeply to be read")
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            group = TokenGroup([], [], [], problem=f"{kind}{on_one_line(error)}")
            of_text = UNREAD
        return {**_columns(group), **of_text, "row": number}


def _columns(group: TokenGroup) -> dict[str, Any]:
    return {
        "prompt": group.prompt,
        "completions": group.completions,
        "masks": group.masks,
        "winners": [winner for winner, _, _ in group.edges],
        "losers": [loser for _, loser, _ in group.edges],
        "margins": [margin for _, _, margin in group.edges],
        "labels": group.labels,
        "edge_weights": group.edge_weights,
        "completion_weights": group.completion_weights,
        "completion_lengths": list(map(len, group.completions)),
        "num_tokens": len(group.prompt) + sum(map(len, group.completions)),
        "num_completion_tokens": sum(map(len, group.completions)),
        "num_scored_tokens": sum(group.scored),
        "num_sequences": len(group.completions),
        "num_edges": len(group.edges),
        "num_margins": sum(margin is not None for _, _, margin in group.edges),
        "num_labels": sum(label != 0 for label in group.labels),
        "num_weights": len(group.completion_weights),
        "boundary_cut": group.boundary_cut,
        "truncated": group.truncated,
        "equal": group.equal,
        "notes": list(group.notes),
        "problem": group.problem,
    }


def tokenise_all(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    adapter: str,
    num_proc: int | None,
    path: Path,
) -> None:
    """Write a table of FEATURES with a row for every example of the source, whole or not at all."""
    scratch = path.with_name(path.name + ".scratch")  # so that no more than a batch is held in memory
    scratch.mkdir(exist_ok=True)
    table = source.rows.map(
        _RowTokeniser(
            tokenizer,
            rules,
            adapter,
            source.unit,
            source.classes,
            None if rules.template_may_drop else most_characters(tokenizer, rules.max_length),
            special_spellings(tokenizer),
            frozenset(map(str, tokenizer.added_tokens_decoder.values())),
        ),
        with_indices=True,
        remove_columns=source.rows.column_names,
        features=FEATURES,
        num_proc=num_proc,
        new_fingerprint=path.name.removeprefix("groups-"),
        load_from_cache_file=False,
        cache_file_name=str(scratch / "rows.arrow"),
        desc=f"tokenising {source.name}",
    )

    def write(partial: Path) -> None:
        table.save_to_disk(str(partial))
        store_columns(table, partial)
        seal(partial)

    write_folder_atomically(path, write)
    shutil.rmtree(scratch)


def adapter_in(
    source: Source, rules: TokenRules, choose: Callable[[Iterable[str], RowRules, bool], str] = choose_adapter
) -> str:
    """The adapter for a source's columns. Those of JSON lines are taken from the first readable line."""
    if source.unit != "line":
        return choose(source.rows.column_names, rules.rows, rules.supervised)
    problem = None
    row: Any
    for row in source.rows:
        try:
            return choose(fields_of(row, source.unit, source.classes), rules.rows, rules.supervised)
        except UserError as error:
            problem = problem or f"{source.where(row['line'])}: {error}"
    raise UserError(str(problem))


def check_readable(where: Callable[[int], str], table: datasets.Dataset, on_bad_row: str) -> None:
    """Raise UserError that names the first unreadable example, unless `on_bad_row` is drop."""
    bad = np.flatnonzero(column_of(table, "unreadable"))
    if len(bad) and on_bad_row == "error":
        first = table[int(bad[0])]
        more = f" ({len(bad)} bad rows of {len(table)})" if len(bad) > 1 else ""
        way_out = "; mend the row, or set data.on_bad_row=drop to train without it"
        if len(bad) == len(
            table
        ):  # what is wrong with all rows is not for the rows to mend, unless it is one
            way_out = "; mend the row" if len(bad) == 1 else ""
        raise DataError(f"{where(first['row'])}: {first['problem']}{more}{way_out}")
