"""The files of a split: which files of a folder it is, and whether they are all of it and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from madpo.trainer.config.data import DataConfig
from madpo.trainer.errors import UserError


def split_files(data: DataConfig, split: str) -> list[Path] | None:
    """The files of a split: one .jsonl, or .parquet or .arrow files in order; None for a name on the hub.

    Raises UserError for a missing file, split or part of one, a split that is there twice, and another file
    type.
    """
    assert data.dataset_name is not None
    if "://" in data.dataset_name:
        raise UserError(
            f"data.dataset_name: {data.dataset_name}: a URL is not read; download the file, or give the data "
            "set's name on the hub"
        )
    path = Path(data.dataset_name).expanduser()
    if path.is_dir():
        if saved := saved_in(path):
            _check_single(path, split, data)
        files = files_in(path, split)
        if saved and files:
            raise UserError(_twice(path, split, [path / "state.json", *files]))
        if not saved and not files:
            raise UserError(
                f"{path}: no split {split!r}; expected {split}.jsonl, {split}.parquet, {split}-*.parquet or "
                f"a folder {split} of save_to_disk, found {sorted(file.name for file in path.iterdir())[:20]}"
            )
        return saved or files
    if path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise UserError(f"data.dataset_name: {path}: no such file")
        _check_single(path, split, data)
        return [path]
    if path.is_file():
        raise UserError(f"data.dataset_name: {path}: a file must be .jsonl or .parquet")
    return None


def files_in(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder, in order; [] if it has none of that name.

    Raises UserError if the folder holds the split twice, only a part of it, or more than can be read.
    """
    parts = sorted(folder.glob(f"{split}-*.parquet"))
    named = (folder / f"{split}{suffix}" for suffix in (".jsonl", ".parquet"))
    ways = [*([file] for file in named if file.is_file()), parts, saved_in(folder / split)]
    files, *others = [way for way in ways if way] or [[]]
    unread = [file for file in _numbered(folder, split) if file not in files]
    if others or (files and unread):
        raise UserError(_twice(folder, split, dict.fromkeys(chain(files, *others, unread))))
    if unread:
        raise UserError(
            f"{folder}: split {split!r} is in parts that are not read together: {_names(unread)}; join those "
            f"of JSON lines into {split}.jsonl with cat, or name Parquet files {split}-*.parquet"
        )
    if files == parts:
        _check_series(folder, split, parts)
    return files


def saved_in(folder: Path) -> list[Path]:
    """The files of a data set that `datasets` saved into a folder, in order; [] if it is no such folder."""
    note = folder / "state.json"
    if not note.is_file():
        return []
    state = json.loads(note.read_text())
    if state.get("_indices_data_files"):
        raise UserError(f"{folder}: saved with a selection of its rows; save flatten_indices() of it")
    return [folder / part["filename"] for part in state["_data_files"]]


_PART = re.compile(r"[-_.](?:part|shard|chunk)?[-_.]?\d+(?:-of-\d+)?", re.IGNORECASE)
"""What stands behind the name of a split in the name of a file that holds a part of it."""


def _numbered(folder: Path, split: str) -> list[Path]:
    """The files that are parts of a split by their names, which need not be read."""
    files = (file for suffix in ("jsonl", "parquet") for file in sorted(folder.glob(f"{split}*.{suffix}")))
    return [file for file in files if _PART.fullmatch(file.stem.removeprefix(split))]


_NUMBER = re.compile(r"(?P<split>.*?)(?:-\d+)*?-(?P<number>\d+)(?:-of-(?P<count>\d+)(?:-[0-9a-f]{16})?)?")
"""The name of a Parquet file that is a part: train-00000-of-00003, maybe with a hash, or train-0."""


def _check_series(folder: Path, split: str, parts: Sequence[Path]) -> None:
    """Raise UserError unless the parts of a split are one series of files, of which none is missing."""
    found = [match for file in parts if (match := _NUMBER.fullmatch(file.stem))]
    counts = {int(match["count"]) for match in found if match["count"]}
    is_single = len({match["split"] for match in found}) <= 1
    if counts:
        is_single &= len({match["count"] for match in found}) == 1 and len(parts) <= min(counts)
        is_single &= len(found) == len(parts)
    if not is_single:
        raise UserError(
            f"{folder}: {split}-*.parquet are files of several splits, or of one that was written several "
            f"times: {_names(parts)}; leave those of one there, or name its split in data.dataset_train_split"
        )
    numbers = {int(match["number"]) for match in found}
    missing = [number for count in counts for number in range(count) if number not in numbers]
    if missing:
        raise UserError(
            f"{folder}: split {split!r} is {len(parts)} of {max(counts)} files, without number "
            f"{', '.join(map(str, missing[:5]))}; put what is missing there, or name the files "
            f"{split}-0.parquet and so on to do without"
        )


def _twice(folder: Path, split: str, files: Iterable[Path]) -> str:
    return (
        f"{folder}: split {split!r} stands there twice: {_names(files)}; leave one of them there, or join "
        f"parts of JSON lines into {split}.jsonl with cat"
    )


MOST_NAMED = 6


def _names(files: Iterable[Path]) -> str:
    named = [f"{x.parent.name}/{x.name}" if x.suffix == ".arrow" else x.name for x in files]
    return ", ".join(named[:MOST_NAMED]) + (", ..." if len(named) > MOST_NAMED else "")


def _check_single(path: Path, split: str, data: DataConfig) -> None:
    """Raise UserError if a single set of rows is asked for another split than the training's."""
    train = data.dataset_train_split
    if split != train:
        kind = "split" if path.is_dir() else "file"
        raise UserError(
            f"data.dataset_test_split: {path} is a single {kind}, so {split!r} would be its training rows; "
            f"put {train}.jsonl and {split}.jsonl (or .parquet) into a folder"
        )
