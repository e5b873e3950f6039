"""Sources that are opened as a whole: a file, a folder of splits, or a name on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

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
    rows = datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache / "rows"))
    return Source(str(files[0]), rows, fingerprint, "row")  # type: ignore[arg-type]


def split_files(data: DataConfig, split: str) -> list[Path] | None:
    """The files of a split: one .jsonl, or .parquet files in order; None for a name on the hub.

    Raises UserError for a missing file or split, a split that is there twice, and another file type.
    """
    assert data.dataset_name is not None
    path = Path(data.dataset_name).expanduser()
    if path.is_dir():
        named = [path / f"{split}{suffix}" for suffix in (".jsonl", ".parquet")]
        files = [file for file in named if file.is_file()]
        shards = sorted(path.glob(f"{split}-*.parquet"))
        if len(files) + bool(shards) > 1:
            raise UserError(f"{path}: split {split!r} stands there twice: {[x.name for x in files + shards]}")
        if not files and not shards:
            raise UserError(
                f"{path}: no split {split!r}; expected {split}.jsonl, {split}.parquet or {split}-*.parquet, "
                f"found {sorted(file.name for file in path.iterdir())[:20]}"
            )
        return files or shards
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
    try:
        rows = datasets.load_dataset(data.dataset_name, data.dataset_config, split=split, streaming=streaming)
    except Exception as error:
        raise UserError(
            f"data.dataset_name: {data.dataset_name!r} is no local file or folder, and loading it by "
            f"name failed: {type(error).__name__}: {on_one_line(error)}"
        ) from error
    assert isinstance(rows, datasets.Dataset | datasets.IterableDataset)
    return rows


def _lines(path: str) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield {"line": number, "raw": raw}
