"""How much of a batch's logits is worked on at once, within a budget of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from madpo.kernels.layout import Groups, Span

MIN_COLUMNS = 256


@dataclass(frozen=True)
class Wave:
    """A span whose logits are formed together."""

    span: Span
    logits_dtype: torch.dtype
    columns: int  # of the vocabulary at a time; all of it, unless the span exceeds the budget


def plan_waves(
    groups: Groups,
    vocab_size: int,
    budget_bytes: int,
    wide: torch.dtype,
    narrow: torch.dtype,
) -> list[Wave]:
    """Cut the batch into waves whose logits take at most `budget_bytes`.

    As few waves as possible, then as even as possible: GEMMs lose speed with few rows. Logits are
    kept in `wide`. A group that is too large for that is a wave of its own: in `narrow` if that fits,
    else in `wide` again but a slab of columns at a time, twice (MIN_COLUMNS at the least, whatever
    the budget).
    """
    spans = _group_spans(groups)
    sizes = [span.num_rows for span in spans]
    low, high = 1, max(budget_bytes // (padded(vocab_size) * wide.itemsize), 1)
    fewest = len(_cut(sizes, high))
    while low < high:
        middle = (low + high) // 2
        if len(_cut(sizes, middle)) == fewest:
            high = middle
        else:
            low = middle + 1
    joined = (_join(spans[first], spans[last - 1]) for first, last in pairwise([0, *_cut(sizes, high)]))
    return [_wave(span, vocab_size, budget_bytes, wide, narrow) for span in joined]


def _cut(sizes: Sequence[int], most: int) -> list[int]:
    """Where runs of neighbours end that sum to at most `most`; a larger one is a run of its own."""
    ends: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if index and total + size > most:
            ends.append(index)
            total = 0
        total += size
    return [*ends, len(sizes)] if sizes else []


def _wave(span: Span, vocab_size: int, budget_bytes: int, wide: torch.dtype, narrow: torch.dtype) -> Wave:
    cells = span.num_rows * padded(vocab_size)
    for dtype in (wide, narrow):
        if cells * dtype.itemsize <= budget_bytes:
            return Wave(span, dtype, vocab_size)
    columns = budget_bytes // (span.num_rows * wide.itemsize) // MIN_COLUMNS * MIN_COLUMNS
    return Wave(span, wide, min(vocab_size, max(columns, MIN_COLUMNS)))


def _group_spans(groups: Groups) -> list[Span]:
    rows = [0, *accumulate(groups.lengths)]
    sequences = [0, *accumulate(groups.group_sequences)]
    edges = [0, *accumulate(groups.group_edges)]
    return [
        Span(
            slice(g, g + 1),
            slice(sequences[g], sequences[g + 1]),
            slice(edges[g], edges[g + 1]),
            slice(rows[sequences[g]], rows[sequences[g + 1]]),
        )
        for g in range(len(groups.group_sequences))
    ]


def _join(a: Span, b: Span) -> Span:
    return Span(
        slice(a.groups.start, b.groups.stop),
        slice(a.sequences.start, b.sequences.stop),
        slice(a.edges.start, b.edges.stop),
        slice(a.rows.start, b.rows.stop),
    )


def row_chunks(rows: int, vocab_size: int, budget_bytes: int, itemsize: int) -> list[slice]:
    """Equal runs of rows whose logits take at most `budget_bytes` (one row at the least)."""
    count = -(-rows // max(1, budget_bytes // (padded(vocab_size) * itemsize)))
    edges = [rows * i // count for i in range(count + 1)] if count else []
    return [slice(a, b) for a, b in pairwise(edges)]


def padded(columns: int) -> int:
    """Rows of logits begin at multiples of 16 elements, for GEMMs and wide loads."""
    return -(-columns // 16) * 16
