"""Parquet files, and Arrow files as `datasets.Dataset.save_to_disk` writes them: several are one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError

from madpo.trainer.data.class_labels import classes_in
from madpo.trainer.data.in_memory import place_in_memory
from madpo.trainer.errors import DataError, UserError, on_one_line


def open_table(files: Sequence[Path], cache: Path) -> datasets.Dataset:
    """The rows of Parquet or of Arrow files. Raises UserError that names a file which cannot be read with the
    others.

    `cache` belongs to the content of the files: datasets' own key is their path and time stamp.
    """
    features = features_of(files)
    names: list[Any] = [str(file) for file in files]
    try:
        if files[0].suffix == ".arrow":
            rows = datasets.concatenate_datasets([datasets.Dataset.from_file(name) for name in names])
        else:
            rows = datasets.Dataset.from_parquet(names, cache_dir=str(cache), features=features)
    except (pa.ArrowException, DatasetGenerationError) as error:
        raise DataError(f"{_unlike(files)}: {on_one_line(error.__cause__ or error)}") from None
    assert isinstance(rows, datasets.Dataset)
    return rows


def stream_table(files: Sequence[Path]) -> datasets.IterableDataset:
    """The rows of Parquet or of Arrow files, read where they are needed. Raises UserError as `open_table`."""
    rows = datasets.load_dataset(
        files[0].suffix.removeprefix("."),
        data_files={"train": [str(file) for file in files]},
        features=features_of(files),
        split="train",
        streaming=True,
    )
    assert isinstance(rows, datasets.IterableDataset)
    return rows


def features_of(files: Sequence[Path]) -> datasets.Features:
    """The columns of all files: one that a file lacks is null there, and numbers may be of two types.

    Raises UserError that names a file which cannot be read, or holds a column that cannot.
    """
    schemas = [_schema(file) for file in files]
    if not sum(sizes_of(files)):
        raise DataError(f"{files[0]}: the file has no rows")
    try:
        common = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{_unlike(files)}: {on_one_line(error)}") from None
    for column in common:
        try:
            datasets.Features.from_arrow_schema(pa.schema([column]))
        except Exception as error:  # one of several kinds, by the type
            file = next(x for x, own in zip(files, schemas, strict=True) if column.name in own.names)
            raise UserError(
                f"{file}: column {column.name} is of type {column.type}, which is not read "
                f"({on_one_line(error)}); leave it out, or write it as text or numbers"
            ) from None
    return datasets.Features({**datasets.Features.from_arrow_schema(common), **_classes(files, schemas)})


def _classes(files: Sequence[Path], schemas: Sequence[pa.Schema]) -> dict[str, Any]:
    """The columns that hold class labels in any file. Raises UserError unless all files that have such a
    column name its classes alike: their numbers would mean different things."""
    features = [datasets.Features.from_arrow_schema(schema) for schema in schemas]
    found = {name: feature for of_file in features for name, feature in classes_in(of_file).items()}
    for name, feature in found.items():
        for file, of_file in zip(files, features, strict=True):
            if of_file.get(name, feature) != feature:
                raise UserError(
                    f"{file}: column {name} is {of_file[name]}, and {feature} in another file; "
                    "write its classes as text"
                )
    return found


def sizes_of(files: Sequence[Path]) -> list[int]:
    """The number of rows of each file."""
    if files[0].suffix == ".arrow":
        return [len(datasets.Dataset.from_file(str(file))) for file in files]
    return [pq.read_metadata(file).num_rows for file in files]


def name_of(files: Sequence[Path]) -> str:
    """How messages name all files of a table together, whose rows are counted on from file to file."""
    return f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else str(files[0])


def place_of(files: Sequence[Path], row: int) -> str:
    """How messages name row number `row` of all files together: the file, and the row's number in it."""
    for file, size in zip(files, sizes_of(files), strict=True):
        if row < size:
            return place_in_memory(file, row) or f"{file} row {row}"
        row -= size
    return f"{files[-1]} row {row}"  # behind the last one


def _schema(file: Path) -> pa.Schema:
    is_arrow = file.suffix == ".arrow"
    try:
        if is_arrow:
            with pa.memory_map(str(file)) as mapped:
                return pa.ipc.open_stream(mapped).schema
        return pq.ParquetFile(file).schema_arrow
    except (pa.ArrowException, OSError) as error:
        kind = "Arrow" if is_arrow else "Parquet"
        raise DataError(f"{file}: cannot be read as {kind}: {on_one_line(error)}") from None


def _unlike(files: Sequence[Path]) -> str:
    """The first file whose columns differ from those of the first, and in what."""
    (first, wanted), *others = ((file, _schema(file)) for file in files)
    for file, schema in others:
        for name in wanted.names:
            kinds = [str(x.field(name).type) if name in x.names else "missing" for x in (wanted, schema)]
            if kinds[0] != kinds[1]:
                return f"{file}: column {name} is {kinds[1]}, and {kinds[0]} in {first}"
    return str(first)
