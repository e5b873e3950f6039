"""How scored tokens form sequences, groups and edges.

M scored tokens (a row of hidden states or logits each) form S sequences (completions), these form G
groups (the completions of one prompt). Each of the E edges is a preference pair of one group: chosen
beats rejected. Everything is consecutive: the tokens of sequence 0, of sequence 1, ...; the sequences and
the edges of group 0, of group 1, ...
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
class GroupLayout:
    """The structure of a batch. The counts are host integers, so that nothing waits for the device."""

    lengths: Sequence[int]  # (S,) scored tokens of each sequence
    group_sequences: Sequence[int]  # (G,) sequences of each group
    group_edges: Sequence[int]  # (G,) edges of each group
    chosen: Tensor  # (E,) index into the S sequences
    rejected: Tensor  # (E,)

    @classmethod
    def pairs(cls, lengths: Sequence[int], device: torch.device | str) -> Self:
        """P pairs, their sequences in the order chosen, rejected, chosen, rejected, ...; lengths (2P,)."""
        if len(lengths) % 2:
            raise ValueError(f"lengths: {len(lengths)} sequences do not form pairs")
        count = len(lengths) // 2
        chosen = torch.arange(0, 2 * count, 2, device=device)
        return cls(lengths, (2,) * count, (1,) * count, chosen, chosen + 1)

    @classmethod
    def alone(cls, lengths: Sequence[int], device: torch.device | str) -> Self:
        """Every sequence is a group of its own, without edges; lengths (S,)."""
        none = torch.empty(0, dtype=torch.int64, device=device)
        return cls(lengths, (1,) * len(lengths), (0,) * len(lengths), none, none)

    @property
    def num_rows(self) -> int:
        return sum(self.lengths)

    @property
    def whole_range(self) -> GroupRange:
        """The range of all groups."""
        counts = len(self.group_sequences), len(self.lengths), sum(self.group_edges), self.num_rows
        return GroupRange(*(slice(0, count) for count in counts))

    @cached_property
    def ranges(self) -> PairRanges:
        """The layout as the kernels take it, on the device of the edges; copied once, without waiting."""
        starts = [
            [0, *accumulate(counts)] for counts in (self.lengths, self.group_sequences, self.group_edges)
        ]
        # From pinned memory, or the copy would wait for the device.
        flat = torch.tensor([x for part in starts for x in part], pin_memory=self.chosen.is_cuda)
        flat = flat.to(self.chosen.device, non_blocking=True)
        rows, sequences, edges = flat.split([len(part) for part in starts])
        return PairRanges(rows, sequences, edges, self.chosen.contiguous(), self.rejected.contiguous())

    @cached_property
    def group_of_row(self) -> Tensor:
        """(M,) the group of each scored token."""
        starts = self.ranges.rows[self.ranges.sequences]  # (G + 1,)
        return torch.repeat_interleave(starts.diff(), output_size=self.num_rows)

    def check(self, rows: int) -> None:
        """Raise ValueError unless the counts agree with each other and with the number of rows."""
        sequences, edges = sum(self.group_sequences), sum(self.group_edges)
        for name, got, want in (
            ("lengths sum to", self.num_rows, rows),
            ("group_sequences sum to", sequences, len(self.lengths)),
            ("group_edges has as many groups as", len(self.group_edges), len(self.group_sequences)),
            ("chosen has as many edges as", len(self.chosen), edges),
            ("rejected has as many edges as", len(self.rejected), edges),
        ):
            if got != want:
                raise ValueError(f"groups: {name} {got}, but {want} are needed")


class PairRanges(NamedTuple):
    """Device tensors: where each range begins, and which two sequences an edge compares."""

    rows: Tensor  # (S + 1,) first row of each sequence
    sequences: Tensor  # (G + 1,) first sequence of each group
    edges: Tensor  # (G + 1,) first edge of each group
    chosen: Tensor  # (E,) index into the S sequences
    rejected: Tensor  # (E,)


@dataclass(frozen=True)
class GroupRange:
    """Consecutive whole groups, as slices of everything they hold."""

    groups: slice  # of the G groups
    sequences: slice  # of the S sequences
    edges: slice  # of the E edges
    rows: slice  # of the M scored tokens

    @property
    def num_rows(self) -> int:
        return self.rows.stop - self.rows.start
