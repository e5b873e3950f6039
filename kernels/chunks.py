"""Cut a batch into chunks whose logits fit a budget of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from madpo.kernels.layout import GroupLayout, GroupRange

MIN_COLUMNS = 256
"""The narrowest block of the vocabulary, whatever the budget."""


@dataclass(frozen=True)
class Chunk:
    """Groups whose logits are formed together: at once, or a block of the vocabulary at a time."""

    group_range: GroupRange
    logits_dtype: torch.dtype
    columns: int  # width of a block: the whole vocabulary unless these logits exceed the budget


def plan_chunks(
    groups: GroupLayout,
    vocab_size: int,
    budget_bytes: int,
    wide: torch.dtype,
    narrow: torch.dtype,
) -> list[Chunk]:
    """Cut the batch into chunks of whole groups whose logits take at most `budget_bytes`.

    As few chunks as possible, then as even as possible: GEMMs lose speed with few rows. Logits have the
    dtype `wide`. A group whose logits exceed the budget is a chunk of its own. Its logits are `narrow` if
    these fit. Otherwise they are `wide` and formed twice, a block of the vocabulary at a time, of
    MIN_COLUMNS at the least.
    """
    group_ranges = _range_of_each_group(groups)
    sizes = [group_range.num_rows for group_range in group_ranges]
    low, high = 1, max(budget_bytes // (padded(vocab_size) * wide.itemsize), 1)
    fewest = len(_cut(sizes, high))
    while low < high:
        middle = (low + high) // 2
        if len(_cut(sizes, middle)) == fewest:
            high = middle
        else:
            low = middle + 1
    joined = (
        _join(group_ranges[first], group_ranges[last - 1])
        for first, last in pairwise([0, *_cut(sizes, high)])
    )
    return [_chunk(group_range, vocab_size, budget_bytes, wide, narrow) for group_range in joined]


def _cut(sizes: Sequence[int], most: int) -> list[int]:
    """The ends of runs of neighbours that sum to at most `most`; a larger size is a run of its own."""
    ends: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if index and total + size > most:
            ends.append(index)
            total = 0
        total += size
    return [*ends, len(sizes)] if sizes else []


def _chunk(
    group_range: GroupRange, vocab_size: int, budget_bytes: int, wide: torch.dtype, narrow: torch.dtype
) -> Chunk:
    cells = group_range.num_rows * padded(vocab_size)
    for dtype in (wide, narrow):
        if cells * dtype.itemsize <= budget_bytes:
            return Chunk(group_range, dtype, vocab_size)
    columns = budget_bytes // (group_range.num_rows * wide.itemsize) // MIN_COLUMNS * MIN_COLUMNS
    return Chunk(group_range, wide, min(vocab_size, max(columns, MIN_COLUMNS)))


def _range_of_each_group(groups: GroupLayout) -> list[GroupRange]:
    rows = [0, *accumulate(groups.lengths)]
    sequences = [0, *accumulate(groups.group_sequences)]
    edges = [0, *accumulate(groups.group_edges)]
    return [
        GroupRange(
            slice(g, g + 1),
            slice(sequences[g], sequences[g + 1]),
            slice(edges[g], edges[g + 1]),
            slice(rows[sequences[g]], rows[sequences[g + 1]]),
        )
        for g in range(len(groups.group_sequences))
    ]


def _join(a: GroupRange, b: GroupRange) -> GroupRange:
    return GroupRange(
        slice(a.groups.start, b.groups.stop),
        slice(a.sequences.start, b.sequences.stop),
        slice(a.edges.start, b.edges.stop),
        slice(a.rows.start, b.rows.stop),
    )


def row_chunks(rows: int, vocab_size: int, budget_bytes: int, itemsize: int) -> list[slice]:
    """Equal runs of rows whose logits take at most `budget_bytes`, at least one row each."""
    count = -(-rows // max(1, budget_bytes // (padded(vocab_size) * itemsize)))
    edges = [rows * i // count for i in range(count + 1)] if count else []
    return [slice(a, b) for a, b in pairwise(edges)]


def padded(columns: int) -> int:
    """Round up to 16: rows of logits begin at multiples of 16 elements, for GEMMs and wide loads."""
    return -(-columns // 16) * 16
