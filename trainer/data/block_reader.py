"""Readers of a stream: a source read block by block, so that it is never held as a whole.

A cursor, plain JSON, says where a block begins. Every block of a stream keeps the cursor of the next.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import xxhash

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data.source import LINES, Origin, Source, line_of, load_by_name, reading
from madpo.trainer.data.split_files import split_files
from madpo.trainer.data.table_files import name_of, place_of, stream_table
from madpo.trainer.errors import UserError
from madpo.trainer.files import sampled_content

FIRST_ROWS = 100


class Reader(Protocol):
    name: str
    version: str  # changes with any change of the files, and maybe without one
    content: str  # a hash that identifies the source, from samples: it may be a terabyte
    start: Any  # the first cursor

    def read(self, cursor: Any, count: int) -> tuple[Source, Any]:
        """Up to `count` examples, fewer only at the end, and the cursor behind them. Raises UserError."""
        ...

    def where(self, cursor: Any, row: int) -> str:
        """How messages name example `row` of the block that begins at `cursor`."""
        ...


def open_reader(data: DataConfig, split: str) -> Reader:
    """The reader of a split. Raises UserError if the split is missing or cannot be read."""
    with reading(str(data.dataset_name)):
        files = split_files(data, split)
        if files is None:
            return RowReader(f"{data.dataset_name}[{split}]", load_by_name(data, split, streaming=True))
        if files[0].suffix == ".jsonl":
            return LineReader(files[0])
        return RowReader(name_of(files), stream_table(files), files)


class LineReader:
    """Reads the lines of a .jsonl file that are not blank. A cursor is the bytes and the lines before it."""

    def __init__(self, path: Path) -> None:
        self.name, self.start = str(path), [0, 0]
        self.content, self.version = sampled_content([path]), _stamp([path])
        self._path = path

    def read(self, cursor: Any, count: int) -> tuple[Source, Any]:
        _check_unchanged([self._path], self.version)
        start, line = cursor
        numbers: list[int] = []
        raws: list[bytes] = []
        with self._path.open("rb") as file:
            file.seek(start)
            while len(raws) < count and (raw := file.readline()):
                line += 1
                if raw.strip():
                    numbers.append(line)
                    raws.append(raw)
            end = file.tell()
        rows = datasets.Dataset.from_dict({"line": numbers, "raw": raws}, features=LINES)
        return Source(Origin(self.name, "line"), rows, self.content), [end, line]

    def where(self, cursor: Any, row: int) -> str:
        return line_of(self._path, row)


class RowReader:
    """Reads the rows of .parquet or .arrow files, or of a data set on the hub. A cursor is the number of rows
    before it, and the state that `datasets` resumes from: the shard and the position in it."""

    def __init__(self, name: str, rows: Any, files: Iterable[Path] = ()) -> None:
        self.name, self._files = name, list(files)
        self._rows: datasets.IterableDataset = rows.with_format("arrow")
        self.start = {"rows": 0, "state": self._rows.state_dict()}
        self.version = _stamp(self._files)
        self.content = sampled_content(self._files) if self._files else self._first_rows()

    def _first_rows(self) -> str:
        """A hash of the name and the first rows: all that is known of a data set on the hub at the start."""
        first, _ = self.read(self.start, FIRST_ROWS)
        return xxhash.xxh3_128_hexdigest(repr((self.name, first.rows.to_list())).encode())

    def read(self, cursor: Any, count: int) -> tuple[Source, Any]:
        _check_unchanged(self._files, self.version)
        rows = self._rows.with_format("arrow")
        rows.load_state_dict(json.loads(json.dumps(cursor["state"])))
        # One by one: `datasets` cannot resume with batches of another size than the state was left with.
        with reading(self.name):
            tables: list[Any] = list(itertools.islice(rows.iter(batch_size=1), count))
        table = (
            pa.concat_tables(tables, promote_options="default").combine_chunks() if tables else pa.table({})
        )
        block = datasets.Dataset(table)  # pyright: ignore[reportArgumentType]
        end = {"rows": cursor["rows"] + len(block), "state": rows.state_dict()}
        return Source(Origin(self.name, "row"), block, ""), end

    def where(self, cursor: Any, row: int) -> str:
        number = cursor["rows"] + row
        return place_of(self._files, number) if self._files else f"{self.name} row {number}"


def _stamp(files: Iterable[Path]) -> str:
    return repr([(file.stat().st_size, file.stat().st_mtime_ns) for file in files])


def _check_unchanged(files: Iterable[Path], version: str) -> None:
    if _stamp(files) != version:
        names = ", ".join(str(file) for file in files)
        raise UserError(f"{names}: changed while it was being read; a stream must stay as it is during a run")
