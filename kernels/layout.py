"""How scored rows form sequences, groups and edges.

M rows (one per completion token) form S sequences (completions), these form G groups (the completions
of one prompt), and E edges compare a winner and a loser of one group. Everything is consecutive: the
rows of sequence 0, of sequence 1, ...; the sequences and the edges of group 0, of group 1, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The structure of a batch. Counts are known on the host, so that nothing waits for the device."""

    lengths: Sequence[int]  # (S,) rows of each sequence
    group_sequences: Sequence[int]  # (G,)
    group_edges: Sequence[int]  # (G,)
    chosen: Tensor  # (E,) index into the S sequences
    rejected: Tensor  # (E,)

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
        flat = torch.tensor([x for part in starts for x in part], pin_memory=self.chosen.is_cuda)
        flat = flat.to(self.chosen.device, non_blocking=True)
        rows, sequences, edges = flat.split([len(part) for part in starts])
        return Layout(rows, sequences, edges, self.chosen.contiguous(), self.rejected.contiguous())

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
            ("winners has as many edges as", len(self.chosen), edges),
            ("losers has as many edges as", len(self.rejected), edges),
        ):
            if got != want:
                raise ValueError(f"groups: {name} {got}, but {want} are needed")


class Layout(NamedTuple):
    """Where things begin, and which sequences an edge compares."""

    rows: Tensor  # (S + 1,) first row of each sequence
    sequences: Tensor  # (G + 1,) first sequence of each group
    edges: Tensor  # (G + 1,)
    chosen: Tensor  # (E,)
    rejected: Tensor  # (E,)


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
