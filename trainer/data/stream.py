"""A training source that is never held as a whole: blocks of examples, read and tokenised when needed.

The groups of a block are shuffled among themselves by (seed, epoch, block), and the blocks follow each
other as in the source. So the order is a function of the number of groups consumed, given how many groups
each block has. That number is kept on disk, in a small record of each block, with the cursor of the next. A
continued run walks over these records to find its position, and reads and tokenises only missing blocks.

Examples are compared with those of all blocks before: what each says, 8 bytes for a comparison or a label, is
kept beside the record of its block, and in memory up to `repeats.MOST_CLAIMS`.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data.block_reader import FIRST_ROWS, Reader
from madpo.trainer.data.dataset import GroupDataset, stored_columns
from madpo.trainer.data.groups import ConcatenatedGroups, TokenDataset, TokenGroups
from madpo.trainer.data.known_tokens import lacks_tokens, with_known_tokens
from madpo.trainer.data.order import permutation
from madpo.trainer.data.repeats import KnownClaims
from madpo.trainer.data.report import Report, claims_in, report_of, total_report, with_known
from madpo.trainer.data.tokenised_cache import (
    adapter_in,
    check_readable,
    groups_key,
    nothing_left,
    rules_of,
    tokenise_all,
    usable_rows,
)
from madpo.trainer.errors import DataError
from madpo.trainer.files import discard_damaged, make_folder, write_atomically


@dataclass(frozen=True)
class BlockRecord:
    """What is known of a block once it has been read; plain JSON on disk."""

    cursor: Any  # where it begins
    following: Any  # where the next one begins; None: the source ends
    report: dict[str, Any]  # what was read, cut and dropped


class ReadTable(NamedTuple):
    """The tokenised examples of a block, a report of them, and how messages name one by its number."""

    examples: datasets.Dataset
    report: Report
    where: Callable[[int], str]


class BlockOfEpoch(NamedTuple):
    """A block in one epoch of the sequence."""

    epoch: int
    block: int
    first: int  # position of its first group in the sequence


class Stream:
    """A training source that is read in blocks.

    `check` gets the groups of a block before they are trained on. It raises UserError, or returns as many
    groups to train on. A block with fewer than `fewest` groups is passed over. The next block is prepared in
    the background, unless it lies behind position `end` of the sequence, where the run stops.
    """

    def __init__(
        self,
        reader: Reader,
        data: DataConfig,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        end: int,
        supervised: bool = False,
        fewest: int = 1,
        check: Callable[[GroupDataset], TokenDataset] = lambda groups: groups,
        known_tokens: int | None = None,
    ) -> None:
        self._reader, self._data, self._split, self._tokenizer = reader, data, split, tokenizer
        self._seed, self._end, self._fewest, self._check = seed, end, fewest, check
        self._known_tokens = known_tokens
        self._rules = rules_of(data, supervised)
        self.content = f"stream {groups_key(reader.content, tokenizer, self._rules)}"
        key = groups_key(reader.content + reader.version, tokenizer, self._rules)
        if lacks_tokens(tokenizer, known_tokens):  # some examples may be dropped
            key += f"-{known_tokens}"
        cache = Path(data.cache_dir) / f"stream-{key}-{data.stream_block}"
        self._folder = make_folder("data.cache_dir", cache)
        self._claims, self._blocks_compared = KnownClaims(), 0
        self.num_groups: int | None = None
        self._records: list[BlockRecord] = []
        self._reached = BlockOfEpoch(0, 0, 0)
        self._cached_groups = functools.lru_cache(maxsize=2)(self._load)
        self._background = ThreadPoolExecutor(1)

    def opened(self) -> Stream:
        """The stream itself, once its first block is read: bad rows in it stop a run before its start.

        Raises UserError.
        """
        self.first()
        return self

    def first(self) -> TokenDataset:
        """The groups of the first block that has some."""
        return self._cached_groups(self._locate(0).block)

    def tables(self) -> Iterator[ReadTable]:
        """What was read of each block, once through the source."""
        block, more = 0, True
        while more:
            record = self._record(block)
            where = functools.partial(self._reader.where, record.cursor)
            yield ReadTable(self._table(block), record.report, where)
            block, more = block + 1, record.following is not None

    def take(self, consumed: int, count: int) -> tuple[TokenGroups, np.ndarray]:
        pieces: list[TokenGroups] = []
        selected: list[np.ndarray] = []
        stop = consumed + count
        while consumed < stop:
            located = self._locate(consumed)
            groups = self._cached_groups(located.block)
            order = self._order(located, len(groups))
            indices = order[consumed - located.first : stop - located.first]
            selected.append(indices + sum(len(piece.counts) for piece in pieces))
            pieces.append(groups)
            consumed += len(indices)
            if located.first + len(groups) < self._end:
                self._prepare_after(located.block)
        return (pieces[0] if len(pieces) == 1 else ConcatenatedGroups(pieces)), np.concatenate(selected)

    def epoch(self, consumed: int) -> float:
        """Whole passes before the last consumed group: the length of a pass is known only at its end."""
        return float(self._locate(consumed - 1).epoch) if consumed else 0.0

    def report(self) -> dict[str, Any]:
        name = f"{self._reader.name}, {len(self._records)} blocks"
        return {self._split: total_report(name, [record.report for record in self._records])}

    def _order(self, located: BlockOfEpoch, num_groups: int) -> np.ndarray:
        if self._data.order == "as_is":
            return np.arange(num_groups)
        return permutation(num_groups, self._seed + (located.block << 32), located.epoch)

    def _locate(self, position: int) -> BlockOfEpoch:
        """The block that holds a position. Raises UserError if no row of the source can be trained on."""
        is_ahead = position >= self._reached.first
        epoch, block, first = self._reached if is_ahead else BlockOfEpoch(0, 0, 0)
        while position >= first + (size := self._size(block)):
            if size == 0:
                self._table(block)  # no group of it will be loaded, so its bad rows are refused here
            first += size
            block += 1
            if self._record(block - 1).following is None:
                if not any(map(self._size, range(block))):
                    report = self.report()[self._split]
                    raise DataError(f"{self._reader.name}: {nothing_left(report, self._data)}")
                epoch, block = epoch + 1, 0
        self._reached = BlockOfEpoch(epoch, block, first)
        return self._reached

    def _size(self, block: int) -> int:
        return self._record(block).report["groups"]

    def _record(self, block: int) -> BlockRecord:
        """The record of a block. Reads it, and every block before it, where there is no record yet."""
        while block >= len(self._records):
            number = len(self._records)
            path = self._path(number, ".json")
            if not path.is_file():
                self._make(number, self._records[-1].following if self._records else self._reader.start)
            record = BlockRecord(**json.loads(path.read_text()))
            if 0 < record.report["groups"] < self._fewest:
                record.report["dropped"]["too few in a block"] = record.report["groups"]
                record.report["groups"] = 0
            self._records.append(record)
        return self._records[block]

    def _load(self, block: int) -> TokenDataset:
        table = self._table(block)
        groups = GroupDataset(table.select(usable_rows(table)), self._reader.name, self._path(block).name)
        return self._check(groups)

    def _table(self, block: int) -> datasets.Dataset:
        """The tokenised rows of a block.

        Raises UserError for an unreadable one, as one with a token that the model does not know, unless those
        are dropped.
        """
        path, record = self._path(block), self._record(block)
        with FileLock(self._folder / "lock"):
            discard_damaged(path, "tokenising anew")
        if not path.is_dir():
            self._make(block, record.cursor)
        table = self._read(path)
        where = functools.partial(self._reader.where, record.cursor)
        check_readable(where, table, self._data.on_bad_row)
        return table

    def _read(self, path: Path) -> datasets.Dataset:
        table = datasets.load_from_disk(str(path))
        assert isinstance(table, datasets.Dataset)
        return with_known_tokens(table, stored_columns(path), self._tokenizer, self._known_tokens)

    def _prepare_after(self, block: int) -> None:
        """Make the next block in the background. An error in it is raised when its turn comes."""
        following = self._record(block).following
        if following is not None and not self._path(block + 1).is_dir():
            self._background.submit(self._make, block + 1, following)

    def _make(self, block: int, cursor: Any) -> None:
        """Read and tokenise a block, unless another rank has: write its table, then its claims and its record
        if they are not there."""
        path, record_path = self._path(block), self._path(block, ".json")
        with FileLock(self._folder / "lock"):
            if path.is_dir() and record_path.is_file():
                return
            source, following = self._reader.read(cursor, self._data.stream_block)
            shutil.rmtree(path, ignore_errors=True)
            if not len(source.rows):
                raise DataError(f"{source.name}: the file has no rows")
            tokenise_all(source, self._tokenizer, self._rules, self._adapter, None, path)
            if record_path.is_file():
                return
            full = len(source.rows) == self._data.stream_block
            more = full and len(self._reader.read(following, 1)[0].rows) > 0
            where = functools.partial(self._reader.where, cursor)
            report = self._report(block, source.name, self._read(path), where)
            record = BlockRecord(cursor, following if more else None, report)
            write_atomically(record_path, json.dumps(asdict(record)))

    def _report(self, block: int, name: str, table: datasets.Dataset, where: Callable[[int], str]) -> Report:
        """The report of a block, compared with all blocks before, whose claims may be another rank's work."""
        usable = usable_rows(table)
        for earlier in range(self._blocks_compared, block):
            self._claims.add(np.load(self._path(earlier, ".npy")))
        self._blocks_compared = block + 1
        own = report_of(name, table, usable, where)
        report = with_known(own, table, usable, where, self._claims, held_out=False)
        claims = io.BytesIO()
        np.save(claims, claims_in(table, usable)[0])
        write_atomically(self._path(block, ".npy"), claims.getvalue())
        return report

    @functools.cached_property
    def _adapter(self) -> str:
        """The adapter, chosen by the first rows of the source."""
        return adapter_in(self._reader.read(self._reader.start, FIRST_ROWS)[0], self._rules)

    def _path(self, block: int, suffix: str = "") -> Path:
        return self._folder / f"block-{block:08d}{suffix}"
