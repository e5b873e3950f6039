"""A data set as token groups on disk: read, checked, tokenised once, cached by content.

Every rank calls `load_groups`; a file lock lets one of them do the work and the others wait without
holding a collective open, however long it takes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config import DataConfig
from madpo.trainer.data.adapters import ADAPTERS
from madpo.trainer.data.formats import parse_json_line
from madpo.trainer.data.packing import check_budget
from madpo.trainer.data.rows import RowRules, choose_adapter, read_row
from madpo.trainer.data.tokenise import TokenGroup, TokenRules, special_spellings, spells_special, tokenise
from madpo.trainer.errors import UserError
from madpo.trainer.objectives.base import Item, Objective

FORMAT_VERSION = 3
"""Part of the cache key; raise it when the same rows would give other tokens."""

FEATURES = datasets.Features(
    {
        "prompt": datasets.Sequence(datasets.Value("int32")),
        "completions": datasets.Sequence(datasets.Sequence(datasets.Value("int32"))),
        "winners": datasets.Sequence(datasets.Value("int32")),
        "losers": datasets.Sequence(datasets.Value("int32")),
        "margins": datasets.Sequence(datasets.Value("float64")),
        "labels": datasets.Sequence(datasets.Value("int8")),
        "num_tokens": datasets.Value("int32"),
        "num_completion_tokens": datasets.Value("int32"),
        "num_sequences": datasets.Value("int32"),
        "num_edges": datasets.Value("int32"),
        "num_margins": datasets.Value("int32"),
        "num_labels": datasets.Value("int32"),
        "boundary_cut": datasets.Value("int32"),
        "truncated": datasets.Value("int32"),
        "equal": datasets.Value("int32"),
        "spells_special": datasets.Value("bool"),
        "problem": datasets.Value("string"),
        "unreadable": datasets.Value("bool"),
        "row": datasets.Value("int64"),
    }
)
LINES = datasets.Features({"line": datasets.Value("int64"), "raw": datasets.Value("binary")})


class GroupDataset:
    """Token groups by index, memory-mapped, with the counts that batches are planned from."""

    def __init__(self, table: datasets.Dataset, name: str, fingerprint: str) -> None:
        self.name = name
        self.fingerprint = fingerprint  # of the rows and everything that made tokens of them
        self.table = table
        self.lengths = _column(table, "num_tokens")  # (G,) packed tokens
        self.completion_tokens = _column(table, "num_completion_tokens")  # (G,)
        self.sequences = _column(table, "num_sequences")  # (G,)
        self.edges = _column(table, "num_edges")  # (G,)
        self.labelled = _column(table, "num_labels")  # (G,) sequences that are desirable or not

    @cached_property
    def rows(self) -> np.ndarray:
        """(G,) the line in a .jsonl file that a group comes from, else the number of its row."""
        return _column(self.table, "row")

    @cached_property
    def completion_lengths(self) -> np.ndarray:
        """(S,) tokens of every completion."""
        return _flat(self.table, "completions", lambda x: pc.call_function("list_value_length", [x]))

    @cached_property
    def margins(self) -> np.ndarray:
        """(E,) margins of all edges; NaN where the data set has none."""
        return _flat(self.table, "margins")

    def __len__(self) -> int:
        return len(self.table)

    def ease(self, order: str) -> np.ndarray | None:
        """(G,) what `data.order` sorts by, largest first; None for shuffled.

        easy_to_hard takes the mean margin of a group's edges. Raises ValueError if a group has none.
        """
        if order == "shuffled":
            return None
        if order == "as_is":
            return -np.arange(len(self), dtype=np.float64)
        if np.isnan(self.margins).any() or not self.edges.all():
            raise UserError(
                f"data.order: easy_to_hard sorts by margin, and {self.name} has pairs without one, or rows "
                "that are no pairs here; give a `margin` column (score of chosen minus score of rejected)"
            )
        return np.add.reduceat(self.margins, np.cumsum(self.edges) - self.edges) / self.edges

    def __getitem__(self, index: int) -> TokenGroup:
        row = self.table[int(index)]
        edges = list(zip(row["winners"], row["losers"], row["margins"], strict=True))
        counts = {name: row[name] for name in ("boundary_cut", "truncated", "equal")}
        return TokenGroup(row["prompt"], row["completions"], edges, row["labels"], **counts)

    def require(self, objective: Objective, loss_type: str, budget: int) -> None:
        """Raise ValueError unless the groups hold what the objective needs and fit the token budget."""
        check_budget(self.lengths, budget)
        if objective.item is Item.EDGE and not self.edges.all():
            raise UserError(
                f"{self.name}: objective {loss_type} compares completions; give columns prompt, chosen "
                "and rejected, or use loss_type nll"
            )
        if "labels" in objective.needs and not self.labelled.all():
            raise UserError(
                f"{self.name}: objective {loss_type} needs labels; give columns prompt, completion and label "
                "(true or false), or prompt, chosen and rejected"
            )
        missing = np.flatnonzero(_column(self.table, "num_margins") < self.edges)
        if objective.needs_margin and len(missing):
            raise UserError(
                f"{self.name}: {len(missing)} of {len(self)} rows have no margin, which objective "
                f"{loss_type} needs; give a `margin` column (score of chosen minus score of rejected) or "
                "use loss_type dpo"
            )


def _flat(table: datasets.Dataset, name: str, of_each: Callable[[Any], Any] | None = None) -> np.ndarray:
    """The numbers of a column of lists, one list after another; NaN for null. Or `of_each` of what is in
    the lists."""
    column: Any = table.with_format("arrow")[name][:]
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = column.flatten()
    return (flat if of_each is None else of_each(flat)).to_numpy(zero_copy_only=False)


def _column(table: datasets.Dataset, name: str) -> np.ndarray:
    return np.asarray(table.with_format("numpy")[name][:])


@dataclass(frozen=True)
class Source:
    """Where rows come from: `rows` holds either columns or one raw JSON line per row."""

    name: str
    rows: datasets.Dataset
    fingerprint: str
    unit: str  # how a row is named in messages: "{name}:{line}" or "{name} row {index}"

    def where(self, row: int) -> str:
        return f"{self.name}:{row}" if self.unit == "line" else f"{self.name} row {row}"


def rules_of(data: DataConfig, supervised: bool = False) -> TokenRules:
    """What the config says of reading rows and making tokens of them."""
    rows = RowRules(data.adapter, data.columns, data.edges)
    return TokenRules(data.max_length, data.append_eos, supervised, data.chat_template_kwargs, rows)


def load_groups(
    data: DataConfig, split: str, tokenizer: PreTrainedTokenizerBase, supervised: bool = False
) -> tuple[GroupDataset, dict[str, Any]]:
    """The groups of one split and a report of what was read, cut and dropped.

    Raises ValueError for a missing file or split, unknown columns, an unreadable row (unless
    `on_bad_row: drop`), and a split in which nothing can be trained on.
    """
    cache = Path(data.cache_dir).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    rules = rules_of(data, supervised)
    lock = f"lock-{xxhash.xxh3_64_hexdigest(data.dataset_name.encode())}"
    with FileLock(cache / lock):
        source = open_source(data, split, cache)
        identity = (FORMAT_VERSION, source.fingerprint, tokenizer_identity(tokenizer), asdict(rules))
        path = cache / f"groups-{xxhash.xxh3_128_hexdigest(repr(identity).encode())}"
        if not path.is_dir():
            _tokenise_all(source, tokenizer, rules, data.dataset_num_proc, path)
        table = datasets.load_from_disk(str(path))
    assert isinstance(table, datasets.Dataset)
    report = _report(source, table)
    _refuse_unreadable(source, table, data.on_bad_row)
    usable = np.flatnonzero(_column(table, "problem") == "")
    if not len(usable):
        raise UserError(
            f"{source.name}: none of {len(table)} rows can be trained on: {report['dropped']}; "
            f"data.max_length is {data.max_length}"
        )
    return GroupDataset(table.select(usable), source.name, path.name), report


def open_source(data: DataConfig, split: str, cache: Path) -> Source:
    """Find the rows of a split: a file, a folder of `<split>.jsonl|.parquet`, or a hub name."""
    path = Path(data.dataset_name).expanduser()
    if path.is_dir():
        found = [path / f"{split}{suffix}" for suffix in (".jsonl", ".parquet")]
        files = [file for file in found if file.is_file()]
        shards = sorted(path.glob(f"{split}-*.parquet"))
        if len(files) + bool(shards) > 1:
            raise UserError(f"{path}: split {split!r} stands there twice: {[x.name for x in files + shards]}")
        files = files or shards
        if not files:
            raise UserError(
                f"{path}: no split {split!r}; expected {split}.jsonl, {split}.parquet or {split}-*.parquet, "
                f"found {sorted(file.name for file in path.iterdir())[:20]}"
            )
    elif path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise UserError(f"data.dataset_name: {path}: no such file")
        if split != data.dataset_train_split:
            raise UserError(
                f"data.dataset_test_split: {path} is a single file, so {split!r} would be its training rows; "
                f"put {data.dataset_train_split}{path.suffix} and {split}{path.suffix} into a folder"
            )
        files = [path]
    elif path.is_file():
        raise UserError(f"data.dataset_name: {path}: a file must be .jsonl or .parquet")
    else:
        return _open_hub(data, split)
    content = xxhash.xxh3_128()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                content.update(block)
    fingerprint = content.hexdigest()
    if files[0].suffix == ".jsonl":
        if next(_lines(str(files[0])), None) is None:
            raise UserError(f"{files[0]}: the file has no rows")
        rows = datasets.Dataset.from_generator(
            _lines,
            features=LINES,
            gen_kwargs={"path": str(files[0])},
            cache_dir=str(cache / "lines"),
            fingerprint=fingerprint,
        )
        assert isinstance(rows, datasets.Dataset)
        return Source(str(files[0]), rows, fingerprint, "line")
    rows = datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache / "rows"))
    return Source(str(files[0]), rows, fingerprint, "row")  # type: ignore[arg-type]


def _open_hub(data: DataConfig, split: str) -> Source:
    try:
        rows = datasets.load_dataset(data.dataset_name, data.dataset_config, split=split)
    except Exception as error:
        raise UserError(
            f"data.dataset_name: {data.dataset_name!r} is no local file or folder, and loading it by "
            f"name failed: {type(error).__name__}: {error}"
        ) from error
    assert isinstance(rows, datasets.Dataset)
    return Source(f"{data.dataset_name}[{split}]", rows, rows._fingerprint, "row")


def _lines(path: str) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield {"line": number, "raw": raw}


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


@dataclass(frozen=True)
class _RowTokeniser:
    """Picklable, so that several processes can tokenise."""

    tokenizer: PreTrainedTokenizerBase
    rules: TokenRules
    adapter: str
    raw_lines: bool
    spellings: re.Pattern[str] | None  # of special tokens

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        number = row["line"] if self.raw_lines else index
        try:
            fields = parse_json_line(row["raw"]) if self.raw_lines else row
            text = read_row(fields, ADAPTERS[self.adapter], self.rules.rows, self.rules.supervised)
            group = tokenise(text, self.tokenizer, self.rules)
            if len(group.completions) > 1 and not group.edges and not group.problem:
                group = replace(group, problem="no completion is better than another")
            spells = spells_special(text, self.spellings)
        except Exception as error:  # a chat template, for one, raises what it likes
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            group = TokenGroup([], [], [], problem=f"{kind}{error}")
            return {**_columns(group), "spells_special": False, "unreadable": True, "row": number}
        return {**_columns(group), "spells_special": spells, "unreadable": False, "row": number}


def _columns(group: TokenGroup) -> dict[str, Any]:
    return {
        "prompt": group.prompt,
        "completions": group.completions,
        "winners": [winner for winner, _, _ in group.edges],
        "losers": [loser for _, loser, _ in group.edges],
        "margins": [margin for _, _, margin in group.edges],
        "labels": group.labels,
        "num_tokens": len(group.prompt) + sum(map(len, group.completions)),
        "num_completion_tokens": sum(map(len, group.completions)),
        "num_sequences": len(group.completions),
        "num_edges": len(group.edges),
        "num_margins": sum(margin is not None for _, _, margin in group.edges),
        "num_labels": sum(label != 0 for label in group.labels),
        "boundary_cut": group.boundary_cut,
        "truncated": group.truncated,
        "equal": group.equal,
        "problem": group.problem,
    }


def _tokenise_all(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    num_proc: int | None,
    path: Path,
) -> None:
    raw_lines = source.unit == "line"
    adapter = _adapter(source, rules.rows, rules.supervised)
    table = source.rows.map(
        _RowTokeniser(tokenizer, rules, adapter, raw_lines, special_spellings(tokenizer)),
        with_indices=True,
        remove_columns=source.rows.column_names,
        features=FEATURES,
        num_proc=num_proc,
        new_fingerprint=path.name.removeprefix("groups-"),
        load_from_cache_file=False,
        keep_in_memory=len(source.rows) < 100_000 and num_proc is None,
        desc=f"tokenising {source.name}",
    )
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    table.save_to_disk(str(partial))
    os.replace(partial, path)


def _adapter(source: Source, rules: RowRules, supervised: bool) -> str:
    """The adapter for the columns; JSON lines have those of the first line that can be read."""
    if source.unit != "line":
        return choose_adapter(source.rows.column_names, rules, supervised)
    problem = None
    row: Any
    for row in source.rows:
        try:
            return choose_adapter(parse_json_line(row["raw"]), rules, supervised)
        except UserError as error:
            problem = problem or f"{source.where(row['line'])}: {error}"
    raise UserError(str(problem))


def _refuse_unreadable(source: Source, table: datasets.Dataset, on_bad_row: str) -> None:
    bad = np.flatnonzero(_column(table, "unreadable"))
    if len(bad) and on_bad_row == "error":
        first = table[int(bad[0])]
        more = f" ({len(bad)} such rows of {len(table)})" if len(bad) > 1 else ""
        raise UserError(
            f"{source.where(first['row'])}: {first['problem']}{more}; "
            "mend the row, or set data.on_bad_row=drop to train without it"
        )


def _report(source: Source, table: datasets.Dataset) -> dict[str, Any]:
    problems = _column(table, "problem")
    unreadable = _column(table, "unreadable")
    usable = problems == ""
    reasons = np.where(unreadable, "unreadable", problems)[~usable]
    every = table.data.column("margins").combine_chunks().filter(pa.array(usable))
    margins = every.flatten().to_numpy(zero_copy_only=False)
    margins = margins[~np.isnan(margins)]
    report: dict[str, Any] = {
        "source": source.name,
        "rows": len(table),
        "groups": int(usable.sum()),
        "dropped": {str(r): int(n) for r, n in zip(*np.unique(reasons, return_counts=True), strict=True)},
        "tokens": int(_column(table, "num_tokens")[usable].sum()),
        "truncated_completions": int(_column(table, "truncated")[usable].sum()),
        "groups_with_moved_boundary": int((_column(table, "boundary_cut")[usable] > 0).sum()),
        "comparisons_of_equal_tokens": int(_column(table, "equal")[usable].sum()),
        "rows_that_spell_special_tokens": int(_column(table, "spells_special").sum()),
    }
    if len(margins):
        report["margin_min"], report["margin_max"] = float(margins.min()), float(margins.max())
        report["margin_mean"] = float(margins.mean())
    return report
