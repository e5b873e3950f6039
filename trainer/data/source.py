"""Sources that are opened as a whole: a file, a folder of splits, or a name on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError

from madpo.trainer.config.data import DataConfig
from madpo.trainer.errors import UserError, on_one_line
from madpo.trainer.files import hash_of_file

LINES = datasets.Features({"line": datasets.Value("int64"), "raw": datasets.Value("binary")})


@dataclass(frozen=True)
class Source:
    """The examples of a split: `rows` holds their columns, or one raw JSON line each."""

    name: str
    rows: datasets.Dataset
    fingerprint: str
    unit: str  # "line" or "row": messages say "{name}:{line}" or "{name} row {index}"

    def where(self, row: int) -> str:
        return f"{self.name}:{row}" if self.unit == "line" else f"{self.name} row {row}"


def open_source(data: DataConfig, split: str, cache: Path) -> Source:
    """Open a split. Raises UserError if it is missing or empty."""
    files = split_files(data, split)
    if files is None:
        rows = load_by_name(data, split)
        assert isinstance(rows, datasets.Dataset)
        return Source(f"{data.dataset_name}[{split}]", rows, rows._fingerprint, "row")
    fingerprint = hash_of_file(*files)
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
    rows = _parquet_rows(files, cache / "rows" / fingerprint)
    return Source(str(files[0]), rows, fingerprint, "row")  # type: ignore[arg-type]


def _parquet_rows(files: list[Path], cache: Path) -> datasets.Dataset:
    """The rows of Parquet files. Raises UserError that names a file which cannot be read with the others.

    `cache` belongs to the content of the files: datasets' own key is their path and time stamp.
    """
    schemas = []
    for file in files:
        try:
            schemas.append(pq.ParquetFile(file).schema_arrow)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file}: cannot be read as Parquet: {error}") from None
    if not sum(pq.read_metadata(file).num_rows for file in files):
        raise UserError(f"{files[0]}: the file has no rows")
    try:
        common = pa.unify_schemas(schemas, promote_options="permissive")
        rows = datasets.Dataset.from_parquet(
            [str(file) for file in files],
            cache_dir=str(cache),
            features=datasets.Features.from_arrow_schema(common),
        )
    except (pa.ArrowException, DatasetGenerationError) as error:
        kinds = {str(file): schema for file, schema in zip(files, schemas, strict=True)}
        raise UserError(f"{_unlike(kinds)}: {error.__cause__ or error}") from None
    assert isinstance(rows, datasets.Dataset)
    return rows


def _unlike(schemas: dict[str, pa.Schema]) -> str:
    """The first file whose columns differ from those of the first, and in what."""
    (first, wanted), *others = schemas.items()
    for file, schema in others:
        for name in wanted.names:
            kinds = [str(x.field(name).type) if name in x.names else "missing" for x in (wanted, schema)]
            if kinds[0] != kinds[1]:
                return f"{file}: column {name} is {kinds[1]}, and {kinds[0]} in {first}"
    return first


HELD_OUT = ("test", "validation")
"""The splits that `data.dataset_test_split: auto` looks for, in this order."""


def test_split(data: DataConfig) -> str | None:
    """The name of the held-out split; None if nothing is held out. Raises UserError as `load_by_name`."""
    if data.dataset_test_split != "auto":
        return data.dataset_test_split
    assert data.dataset_name is not None
    path = Path(data.dataset_name).expanduser()
    if path.is_dir():
        there = [split for split in HELD_OUT if _files_in(path, split)]
    elif path.suffix in (".jsonl", ".parquet"):
        there = []
    else:
        there = _splits_on_hub(data.dataset_name, data.dataset_config)
    names = (split for split in HELD_OUT if split in there and split != data.dataset_train_split)
    return next(names, None)


@cache
def _splits_on_hub(name: str, config: str | None) -> list[str]:
    with _loading_by_name(name):
        return datasets.get_dataset_split_names(name, config)


def _files_in(folder: Path, split: str) -> list[Path]:
    named = [folder / f"{split}{suffix}" for suffix in (".jsonl", ".parquet")]
    return [file for file in named if file.is_file()] + sorted(folder.glob(f"{split}-*.parquet"))


def split_files(data: DataConfig, split: str) -> list[Path] | None:
    """The files of a split: one .jsonl, or .parquet files in order; None for a name on the hub.

    Raises UserError for a missing file or split, a split that is there twice, and another file type.
    """
    assert data.dataset_name is not None
    path = Path(data.dataset_name).expanduser()
    if path.is_dir():
        files = _files_in(path, split)
        whole = [file.name for file in files if file.stem == split]
        if whole and len(files) > 1:
            raise UserError(f"{path}: split {split!r} stands there twice: {[file.name for file in files]}")
        if not files:
            raise UserError(
                f"{path}: no split {split!r}; expected {split}.jsonl, {split}.parquet or {split}-*.parquet, "
                f"found {sorted(file.name for file in path.iterdir())[:20]}"
            )
        return files
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise UserError(f"data.dataset_name: {path}: no such file")
        if split != data.dataset_train_split:
            raise UserError(
                f"data.dataset_test_split: {path} is a single file, so {split!r} would be its training rows; "
                f"put {data.dataset_train_split}{path.suffix} and {split}{path.suffix} into a folder"
            )
        return [path]
    if path.is_file():
        raise UserError(f"data.dataset_name: {path}: a file must be .jsonl or .parquet")
    return None


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
        raise UserError(
            f"data.dataset_name: {name!r} is no local file or folder, and loading it by "
            f"name failed: {type(error).__name__}: {on_one_line(error)}"
        ) from error


def _lines(path: str) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield {"line": number, "raw": raw}
