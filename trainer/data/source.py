"""Sources that are opened as a whole: a file, a folder of splits, or a name on the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data.class_labels import classes_in, with_class_names
from madpo.trainer.data.in_memory import place_in_memory
from madpo.trainer.data.split_files import files_in, saved_in, split_files
from madpo.trainer.data.table_files import name_of, open_table, place_of
from madpo.trainer.disk_faults import number_of
from madpo.trainer.errors import DataError, UserError, on_one_line
from madpo.trainer.files import discard_damaged, hash_of_file, make_folder, seal
from madpo.trainer.formats.chat_message import without_padding
from madpo.trainer.formats.json_lines import parse_json_line

LINES = datasets.Features({"line": datasets.Value("int64"), "raw": datasets.Value("binary")})


@dataclass(frozen=True)
class Origin:
    """Where the examples of a split come from, for messages about them."""

    name: str
    unit: str  # "line" or "row": messages say "{name}:{line}" or "{name} row {index}"
    files: tuple[Path, ...] = ()  # of a table, where it is one in files

    def where(self, row: int) -> str:
        """How messages name an example by its line, or by its number in all files."""
        if self.unit == "line":
            return line_of(Path(self.name), row)
        return place_of(self.files, row) if self.files else f"{self.name} row {row}"


@dataclass(frozen=True)
class Source:
    """The examples of a split: `rows` holds their columns, or one raw JSON line each."""

    origin: Origin
    rows: datasets.Dataset
    fingerprint: str

    @property
    def name(self) -> str:
        return self.origin.name

    @property
    def unit(self) -> str:
        return self.origin.unit

    @property
    def classes(self) -> dict[str, Any]:
        """The columns that hold class labels, with their features; for `fields_of`."""
        return classes_in(self.rows.features)

    def where(self, row: int) -> str:
        """How messages name an example by its line, or by its number in all files."""
        return self.origin.where(row)

    def examples(self) -> Iterator[tuple[int, Any]]:
        """(number, for `where`; what `fields_of` reads) for every example."""
        row: Any
        for index, row in enumerate(self.rows):
            yield row["line"] if self.unit == "line" else index, row


def fields_of(row: Mapping[str, Any], unit: str, classes: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of an example of a source, by its `unit`. A table's have lost their padding, and those of
    `classes` hold names of classes.

    Raises UserError for a line that is no strict JSON.
    """
    if unit == "line":
        return parse_json_line(row["raw"])
    named = {name: with_class_names(row[name], feature) for name, feature in classes.items()}
    return {name: without_padding(value) for name, value in {**row, **named}.items()}


def line_of(file: Path, line: int) -> str:
    """How messages name a line of a file."""
    return place_in_memory(file, line - 1) or f"{file}:{line}"


def cache_folder(data: DataConfig) -> Path:
    """`data.cache_dir`, which is made if it is not there. Raises UserError if nothing can be kept in it."""
    return make_folder("data.cache_dir", Path(data.cache_dir))


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Make a UserError of whatever a library raises while it reads the data set of this name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if number_of(cause) is not None:  # what was read could not be kept
            raise cause from None
        raise DataError(f"{name}: cannot be read: {type(cause).__name__}: {on_one_line(cause)}") from error


def open_source(data: DataConfig, split: str, cache: Path) -> Source:
    """Open a split. Raises UserError if it is missing, empty, or cannot be read."""
    with reading(str(data.dataset_name)):
        return _open(data, split, cache)


def _open(data: DataConfig, split: str, cache: Path) -> Source:
    files = split_files(data, split)
    if files is None:
        rows = load_by_name(data, split)
        assert isinstance(rows, datasets.Dataset)
        return Source(Origin(f"{data.dataset_name}[{split}]", "row"), rows, rows._fingerprint)
    fingerprint = hash_of_file(*files)
    if files[0].suffix == ".jsonl":
        if next(_lines(str(files[0])), None) is None:
            raise DataError(f"{files[0]}: the file has no rows")
        folder = cache / "lines" / fingerprint
        rows = _kept(folder, lambda: _lines_of(files[0], folder, fingerprint))
        return Source(Origin(str(files[0]), "line"), rows, fingerprint)
    folder = cache / "rows" / fingerprint
    rows = _kept(folder, lambda: open_table(files, folder))
    return Source(Origin(name_of(files), "row", tuple(files)), rows, fingerprint)


def _lines_of(file: Path, cache: Path, fingerprint: str) -> datasets.Dataset:
    rows = datasets.Dataset.from_generator(
        _lines,
        features=LINES,
        gen_kwargs={"path": str(file)},
        cache_dir=str(cache),
        fingerprint=fingerprint,
    )
    assert isinstance(rows, datasets.Dataset)
    return rows


def _kept(folder: Path, make: Callable[[], datasets.Dataset]) -> datasets.Dataset:
    """What `make` gives, which `datasets` keeps in the folder; made anew if it was damaged there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"lock-{folder.name}")):
        discard_damaged(folder, "reading anew")
        before = sorted(folder.rglob("*.arrow"))
        rows = make()
        # Parquet of this content under another name is kept beside it; Arrow files are read where they are.
        if sorted(folder.rglob("*.arrow")) != before:
            seal(folder)
    return rows


HELD_OUT = ("test", "validation")
"""The splits that `data.dataset_test_split: auto` looks for, in this order."""


def test_split(data: DataConfig) -> str | None:
    """The name of the held-out split; None if nothing is held out. Raises UserError as `open_source`."""
    if data.dataset_test_split != "auto":
        return data.dataset_test_split
    assert data.dataset_name is not None
    with reading(data.dataset_name):
        there = _held_out_in(data.dataset_name, data.dataset_config)
    names = (split for split in HELD_OUT if split in there and split != data.dataset_train_split)
    return next(names, None)


def _held_out_in(name: str, config: str | None) -> list[str]:
    path = Path(name).expanduser()
    if path.is_dir():
        return [] if saved_in(path) else [split for split in HELD_OUT if files_in(path, split)]
    is_file = path.is_file() or path.suffix in (".jsonl", ".parquet")
    return [] if is_file else _splits_on_hub(name, config)


@cache
def _splits_on_hub(name: str, config: str | None) -> list[str]:
    with _loading_by_name(name):
        return datasets.get_dataset_split_names(name, config)


def load_by_name(
    data: DataConfig, split: str, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    """A split of a data set on the hub. Raises UserError that says what the hub said."""
    assert data.dataset_name is not None
    with _loading_by_name(data.dataset_name):
        rows = datasets.load_dataset(data.dataset_name, data.dataset_config, split=split, streaming=streaming)
    assert isinstance(rows, datasets.Dataset | datasets.IterableDataset)
    return rows


@contextmanager
def _loading_by_name(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if number_of(error) is not None:  # what was read could not be kept
            raise
        raise UserError(
            f"data.dataset_name: {name!r} is no local file or folder, and loading it by "
            f"name failed: {type(error).__name__}: {on_one_line(error)}"
        ) from error


def _lines(path: str) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield {"line": number, "raw": raw}
