"""A packed row in slices, one for each rank of a group that computes it together."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from madpo.trainer.batches.packing import PackedBatch, Segment


def slice_of(batch: PackedBatch, index: int, size: int) -> PackedBatch:
    """The batch as rank `index` of `size` has it: of equal slices of the tokens its own, with the scored
    rows in it. All else stays that of the whole row.

    A row that does not divide gets tokens at its end that are a segment of their own, seen by no other.
    """
    tokens = len(batch.input_ids)
    fill = -tokens % size
    length = (tokens + fill) // size
    first = index * length

    def own(x: Tensor) -> Tensor:
        return F.pad(x, (0, fill))[first : first + length]

    inside = (batch.scored_positions >= first) & (batch.scored_positions < first + length)
    own_tokens = torch.nonzero(inside)[:, 0]
    end = (Segment(tokens, tokens + fill, tokens, tokens),) if fill else ()
    return dataclasses.replace(
        batch,
        input_ids=own(batch.input_ids),
        position_ids=own(batch.position_ids),
        scored_positions=batch.scored_positions[own_tokens] - first,
        own_tokens=own_tokens,
        segments=(*batch.segments, *end),
    )
