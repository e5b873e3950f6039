"""How scored rows form sequences, groups and edges, and how much of them is worked on at once.

M rows (one per completion token) form S sequences (completions), these form G groups (the completions
of one prompt), and E edges compare a winner and a loser of one group. Everything is consecutive: the
rows of sequence 0, of sequence 1, ...; the sequences and the edges of group 0, of group 1, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor

MIN_COLUMNS = 256


@dataclass(frozen=True)
class Groups:
    """The structure of a batch. Counts are known on the host, so that nothing waits for the device."""

    lengths: Sequence[int]  # (S,) rows of each sequence
    group_sequences: Sequence[int]  # (G,)
    group_edges: Sequence[int]  # (G,)
    winners: Tensor  # (E,) index into the S sequences
    losers: Tensor  # (E,)

    @classmethod
    def pairs(cls, lengths: Sequence[int], device: torch.device | str) -> Self:
        """Sequences in the order chosen, rejected, chosen, rejected, ...; lengths (2P,)."""
        if len(lengths) % 2:
            raise ValueError(f"lengths: {len(lengths)} sequences do not form pairs")
        count = len(lengths) // 2
        chosen = torch.arange(0, 2 * count, 2, device=device)
        return cls(lengths, (2,) * count, (1,) * count, chosen, chosen + 1)

    @classmethod
    def alone(cls, lengths: Sequence[int], device: torch.device | str) -> Self:
        """Every sequence a group of its own, compared with nothing; lengths (S,)."""
        none = torch.empty(0, dtype=torch.int64, device=device)
        return cls(lengths, (1,) * len(lengths), (0,) * len(lengths), none, none)

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)

    @property
    def span(self) -> Span:
        """All of it."""
        counts = len(self.group_sequences), len(self.lengths), sum(self.group_edges), self.num_rows
        return Span(*(slice(0, count) for count in counts))

    @cached_property
    def layout(self) -> Layout:
        """The same on the device of the edges, as the kernels take it; one copy that does not wait."""
        starts = [
            [0, *accumulate(counts)] for counts in (self.lengths, self.group_sequences, self.group_edges)
        ]
        # From pinned memory, or the copy would wait for the device.
        flat = torch.tensor([x for part in starts for x in part], pin_memory=self.winners.is_cuda)
        flat = flat.to(self.winners.device, non_blocking=True)
        rows, sequences, edges = flat.split([len(part) for part in starts])
        return Layout(rows, sequences, edges, self.winners.contiguous(), self.losers.contiguous())

    @cached_property
    def group_of_row(self) -> Tensor:
        """(M,) the group that a row belongs to."""
        starts = self.layout.rows[self.layout.sequences]  # (G + 1,)
        return torch.repeat_interleave(starts.diff(), output_size=self.num_rows)

    def check(self, rows: int) -> None:
        """Raise ValueError where the counts contradict each other."""
        sequences, edges = sum(self.group_sequences), sum(self.group_edges)
        for name, got, want in (
            ("lengths sum to", self.num_rows, rows),
            ("group_sequences sum to", sequences, len(self.lengths)),
            ("group_edges has as many groups as", len(self.group_edges), len(self.group_sequences)),
            ("winners has as many edges as", len(self.winners), edges),
            ("losers has as many edges as", len(self.losers), edges),
        ):
            if got != want:
                raise ValueError(f"groups: {name} {got}, but {want} are needed")


class Layout(NamedTuple):
    """Where things begin, and which sequences an edge compares."""

    rows: Tensor  # (S + 1,) first row of each sequence
    sequences: Tensor  # (G + 1,) first sequence of each group
    edges: Tensor  # (G + 1,)
    winners: Tensor  # (E,)
    losers: Tensor  # (E,)


@dataclass(frozen=True)
class Span:
    """A run of whole groups."""

    groups: slice
    sequences: slice
    edges: slice
    rows: slice

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start


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
