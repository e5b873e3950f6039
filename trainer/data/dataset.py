"""`GroupDataset`: token groups in a memory-mapped table, one row for each."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash

from madpo.trainer.data.groups import GroupCounts, ReferenceLogps, ease_of
from madpo.trainer.data.lengths import Shapes
from madpo.trainer.data.tokenise import TokenGroup

Columns = Callable[[str], np.ndarray]
"""Gives a column by name, of lists their elements one list after another."""

COUNTS = ("tokens", "completion_tokens", "scored_tokens", "sequences", "edges", "labels")

STORED = (*(f"num_{name}" for name in COUNTS), "row", "prompt_hash", "margins")
"""The columns of numbers that every start reads as a whole."""

COLUMNS = "columns"
"""The folder that they are in, in that of their table."""

LARGEST_ID = "largest_id"
"""Stored beside them: the largest token id of each row."""


class GroupDataset:
    """Token groups in a table on disk. All views lie on one of these."""

    def __init__(
        self, table: datasets.Dataset, name: str, fingerprint: str, columns: Columns | None = None
    ) -> None:
        """`columns` gives those of the table, if they are stored; they are read from the table if not."""
        self.name = name
        self.fingerprint = fingerprint  # of the examples and everything that made tokens of them
        self.table = table
        self._column = columns or partial(_read, table)
        self.counts = GroupCounts.all_computed(*(self._column(f"num_{name}") for name in COUNTS))
        self.reference: ReferenceLogps | None = None

    @property
    def rows(self) -> np.ndarray:
        """(G,) the example that a group comes from: its line in a .jsonl file, else its number."""
        return self._rows

    @property
    def prompt_hashes(self) -> np.ndarray:
        """(G,) a hash of each prompt's text."""
        return self._prompt_hashes

    @property
    def margins(self) -> np.ndarray:
        """(E,) margins of all edges; NaN where the data set has none."""
        return self._margins

    @property
    def edge_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """(E,) the winning and (E,) the losing completion of every edge, counted from 0 in its group."""
        return flat_column(self.table, "winners"), flat_column(self.table, "losers")

    @property
    def edge_weights(self) -> np.ndarray | None:
        """(E,) factors on the losses of all edges; None if no example has a weight."""
        return self._weights("edge_weights", self.counts.edges)

    @property
    def completion_weights(self) -> np.ndarray | None:
        """(S,) factors on the losses of all completions; None if no example has a weight."""
        return self._weights("completion_weights", self.counts.sequences)

    def _weights(
        self,
        name: str,
        counts: np.ndarray,  # (G,) weights that each group has, if it has any
    ) -> np.ndarray | None:
        """A column of weights, one list after another, with 1 where an example has none."""
        given = flat_column(self.table, name)
        if not len(given):
            return None
        has_weights = column_of(self.table, "num_weights") > 0
        weights = np.ones(counts.sum())
        weights[np.repeat(has_weights, counts)] = given
        return weights

    # pyright takes no cached_property for a protocol's property, so the cached columns have their own names.
    @cached_property
    def _rows(self) -> np.ndarray:
        return self._column("row")

    @cached_property
    def _prompt_hashes(self) -> np.ndarray:
        return self._column("prompt_hash")

    @cached_property
    def _margins(self) -> np.ndarray:
        return self._column("margins")

    def select(self, indices: np.ndarray, name: str) -> GroupDataset:
        """The groups at `indices` (n,), called `name` in messages."""
        rows = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(indices, np.int64).tobytes())
        return GroupDataset(self.table.select(indices), name, f"{self.fingerprint}, groups {rows}")

    @cached_property
    def completion_lengths(self) -> np.ndarray:
        """(S,) tokens of every completion."""
        return flat_column(self.table, "completion_lengths")

    def shapes(self, indices: np.ndarray) -> Shapes:
        """The lengths of the groups at `indices` (B,), in that order."""
        groups: Any = self.table.select_columns(["completion_lengths"]).with_format("arrow")[indices]
        completions = groups.column(0).combine_chunks().flatten().to_numpy().astype(np.int64)
        counts = self.counts.at(indices)
        return Shapes(counts.lengths - counts.completion_tokens, counts.sequences, completions)

    def __len__(self) -> int:
        return len(self.counts)

    def ease(self, order: str) -> np.ndarray | None:
        """(G,) what `data.order` sorts by, largest first; None for shuffled. Raises UserError."""
        return ease_of(self.name, order, self.margins, self.counts.edges) if order != "shuffled" else None

    def __getitem__(self, index: int) -> TokenGroup:
        row = self.table[int(index)]
        return TokenGroup(
            row["prompt"],
            row["completions"],
            edges=list(zip(row["winners"], row["losers"], row["margins"], strict=True)),
            labels=row["labels"],
            masks=row["masks"],
            edge_weights=row["edge_weights"],
            completion_weights=row["completion_weights"],
            boundary_cut=row["boundary_cut"],
            truncated=row["truncated"],
            equal=row["equal"],
        )


def flat_column(table: datasets.Dataset, name: str) -> np.ndarray:
    """The elements of a column of lists, one list after another; NaN for null."""
    return lists_of(table, name).flatten().to_numpy(zero_copy_only=False)


def lists_of(table: datasets.Dataset, name: str) -> Any:
    """A column of lists as one Arrow array."""
    column: Any = table.with_format("arrow")[name][:]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _read(table: datasets.Dataset, name: str) -> np.ndarray:
    is_list = pa.types.is_list(table.data.schema.field(name).type)
    return flat_column(table, name) if is_list else column_of(table, name)


def store_columns(table: datasets.Dataset, folder: Path) -> None:
    """Write the columns STORED of a table beside it, into files of its folder."""
    folder /= COLUMNS
    folder.mkdir()
    for name in STORED:
        np.save(folder / f"{name}.npy", _read(table, name))
    np.save(folder / f"{LARGEST_ID}.npy", _largest_ids(table))


def _largest_ids(table: datasets.Dataset) -> np.ndarray:
    """(n,) the largest token id of each row; -1 if it has no tokens."""
    largest = [np.empty(0, np.int32)]
    for piece in table.select_columns(["prompt", "completions"]).with_format("arrow").iter(batch_size=10_000):
        prompts, groups = (piece[name].combine_chunks() for name in ("prompt", "completions"))  # type: ignore[union-attr]
        of_prompts, of_completions = (_maxima(x, x.flatten().to_numpy()) for x in (prompts, groups.flatten()))
        largest.append(np.maximum(of_prompts, _maxima(groups, of_completions)))
    return np.concatenate(largest)


def _maxima(lists: Any, values: np.ndarray) -> np.ndarray:
    """The largest of the values that belong to each Arrow list, one after another; -1 of an empty one."""
    sizes = lists.value_lengths().to_numpy()
    maxima = np.full(len(sizes), -1, np.int32)
    if len(values):
        maxima[sizes > 0] = np.maximum.reduceat(values, (np.cumsum(sizes) - sizes)[sizes > 0])
    return maxima


def stored_columns(folder: Path) -> Columns:
    """The stored columns of the table in a folder, mapped: the processes of a machine share their memory."""
    return lambda name: np.asarray(np.load(folder / COLUMNS / f"{name}.npy", mmap_mode="r"))


def column_of(table: datasets.Dataset, name: str) -> np.ndarray:
    """(n,) a column of numbers."""
    column: Any = table.with_format("arrow")[name][:]
    if isinstance(column, pa.ChunkedArray):
        return column.to_numpy()
    return column.to_numpy(zero_copy_only=False)
