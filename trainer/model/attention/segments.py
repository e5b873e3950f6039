"""The segments of one packed row, and the indices that back-ends derive from them, each built once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from madpo.trainer.batches.packing import Segment
from madpo.trainer.sequence_parallel import SequenceGroup


class VarlenIndex(NamedTuple):
    """The segments as kernels for variable lengths take them."""

    keys: Tensor | None  # (K,) indices in the row, segment after segment: its prompt's, then its own
    query_offsets: Tensor  # (segments + 1,) int32
    key_offsets: Tensor  # (segments + 1,) int32
    max_queries: int
    max_keys: int


class SegmentTable:
    """The segments of one batch, and the ranks that share its row if it is in slices.

    Its indices are arithmetic on the host: nothing waits for the device.
    """

    def __init__(self, segments: Sequence[Segment], group: SequenceGroup | None = None) -> None:
        self.segments, self.group = tuple(segments), group
        self.lengths = [segment.end - segment.start for segment in self.segments]
        index = {segment.start: number for number, segment in enumerate(self.segments)}
        # The number of the segment that is the prompt of each segment; None where it has none.
        self.prompts = [
            index[s.prompt_start] if s.prompt_end > s.prompt_start else None for s in self.segments
        ]
        self._varlen: VarlenIndex | None = None
        self._positions: Tensor | None = None

    @cached_property
    def bounds(self) -> np.ndarray:
        """(segments, 4) int64: start, end, prompt_start, prompt_end."""
        return np.array(self.segments, dtype=np.int64)

    @cached_property
    def positions(self) -> np.ndarray:
        """(N,) each token's position in its own sequence, on the host."""
        start, end, prompt_start, prompt_end = self.bounds.T
        return np.arange(end[-1]) - np.repeat(start - (prompt_end - prompt_start), end - start)

    def positions_on(self, device: torch.device) -> Tensor:
        """(N,) `positions` on the device."""
        if self._positions is None:
            self._positions = on_device(self.positions, device)
        return self._positions

    def varlen(self, device: torch.device) -> VarlenIndex:
        """Offsets and key indices. `keys` is None where no prompt is shared: the keys are the row itself."""
        if self._varlen is None:
            start, end, prompt_start, prompt_end = self.bounds.T
            queries, counts = end - start, end - start + prompt_end - prompt_start
            keys = None
            if any(prompt is not None for prompt in self.prompts):
                parts = [range(*ends) for s in self.segments for ends in ((s[2], s[3]), (s[0], s[1]))]
                keys = on_device(np.concatenate([np.arange(part.start, part.stop) for part in parts]), device)
            self._varlen = VarlenIndex(
                keys,
                on_device(np.concatenate(([0], queries.cumsum())).astype(np.int32), device),
                on_device(np.concatenate(([0], counts.cumsum())).astype(np.int32), device),
                int(queries.max()),
                int(counts.max()),
            )
        return self._varlen


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, for which the host does not wait."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
