"""Data sets that are in memory: written into files of the cache, they go the way of any other data set."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import xxhash

from madpo.trainer.errors import UserError
from madpo.trainer.files import hash_of_file, make_folder

Rows = datasets.Dataset | Sequence[Mapping[str, Any]]
"""The examples of a split: a Hugging Face data set, or a list of dicts with its columns as keys."""


HOME = "in_memory"
"""The folder of the cache that these files are in."""


def place_in_memory(file: Path, index: int) -> str | None:
    """How messages name a row of a file of `write_splits`, as in `train[3]`; None for other files."""
    return f"{file.stem}[{index}]" if file.parent.parent.name == HOME else None


def write_splits(splits: Mapping[str, Rows], cache: Path) -> dict[str, Path]:
    """Write splits (name -> rows) into one folder of the cache that is named by its content; name -> file.

    A list becomes lines of JSON, since its rows need not have the same keys; a `Dataset` becomes Parquet.
    Raises UserError that names the row for what cannot be written, and for no rows.
    """
    home = make_folder("data.cache_dir", cache / HOME)
    draft = Path(tempfile.mkdtemp(dir=home))
    try:
        files = [_write(draft, name, rows) for name, rows in splits.items()]
        # By name and content of each: rows that are parted elsewhere are other splits.
        content = json.dumps({file.name: hash_of_file(file) for file in files})
        folder = home / xxhash.xxh3_128_hexdigest(content.encode())
        if not folder.is_dir():
            with contextlib.suppress(OSError):  # another rank may have just written the same
                draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return {name: folder / file.name for name, file in zip(splits, files, strict=True)}


def _write(folder: Path, name: str, rows: Rows) -> Path:
    _check(name, rows)
    if isinstance(rows, datasets.Dataset):
        file = folder / f"{name}.parquet"
        rows.to_parquet(str(file))
    else:
        file = folder / f"{name}.jsonl"
        with file.open("w", encoding="utf-8") as lines:
            lines.writelines(_line(f"{name}[{index}]", row) for index, row in enumerate(rows))
    return file


def _check(name: str, rows: Any) -> None:
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, datasets.Dataset | Sequence):
        raise UserError(
            f"{name}: expected a datasets.Dataset or a list of dicts, got {type(rows).__name__}; "
            f"{_advice(rows)}"
        )
    if not len(rows):
        raise UserError(f"{name}: there are no rows in it")


def _advice(rows: Any) -> str:
    if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
        return f"give one of its splits: {', '.join(map(str, rows))}"
    if isinstance(rows, str | os.PathLike):
        return "the path of a data set belongs into the config, as data.dataset_name"
    if isinstance(rows, datasets.IterableDataset):
        return "write it into a file, and set data.streaming=true to read it while training"
    return "as in [{'prompt': ..., 'chosen': ..., 'rejected': ...}]"


def _line(where: str, row: Any) -> str:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected a dict, got {type(row).__name__}: {row!r:.80}")
    try:
        line = json.dumps(dict(row), ensure_ascii=False, default=_plain) + "\n"
        line.encode()  # which fails for half a character
        return line
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}; rows hold what JSON can: text, numbers, lists, dicts") from None


def _plain(value: Any) -> Any:
    """A number or an array as JSON knows it. Raises TypeError for anything else."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


@contextlib.contextmanager
def named_as_given(files: Mapping[str, Path]) -> Iterator[None]:
    """Let a UserError that names one of these files (argument -> file) name the argument instead."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for name, file in files.items():
            text = text.replace(str(file), name)
        raise UserError(text) from error.__cause__
