"""Sequence parallelism: a packed row cut into slices, one for each rank that shares it."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from madpo.trainer.batches.packing import PackedBatch, Segment


def slice_of(batch: PackedBatch, index: int, size: int) -> PackedBatch:
    """Slice `index` of `size` equal ones: its tokens, and the scored tokens that are predicted in it. All
    other fields stay those of the whole row.

    A row that does not divide is padded at its end, by a segment that no other attends to.
    """
    tokens = len(batch.input_ids)
    padding = -tokens % size
    length = (tokens + padding) // size
    first = index * length

    def own(x: Tensor) -> Tensor:
        return F.pad(x, (0, padding))[first : first + length]

    inside = (batch.scored_positions >= first) & (batch.scored_positions < first + length)
    own_tokens = torch.nonzero(inside)[:, 0]
    last = (Segment(tokens, tokens + padding, tokens, tokens),) if padding else ()
    return dataclasses.replace(
        batch,
        input_ids=own(batch.input_ids),
        position_ids=own(batch.position_ids),
        scored_positions=batch.scored_positions[own_tokens] - first,
        own_tokens=own_tokens,
        segments=(*batch.segments, *last),
    )
