"""The check at start-up that a model computes a row in slices as it computes the whole row."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from madpo.trainer.batches.packing import pack
from madpo.trainer.batches.sequence_slices import slice_of
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError
from madpo.trainer.model.attention.prefix_sharing import SegmentTable, shares_rows
from madpo.trainer.model.backbone import last_hidden
from madpo.trainer.model.positions import position_borders
from madpo.trainer.model.startup.positions import within_positions
from madpo.trainer.sequence_parallel import SequenceGroup

TOLERANCE = {torch.float32: 1e-3}
"""dtype -> relative error allowed; 0.1 for narrower ones."""


@torch.no_grad()
def check_slicing(
    model: PreTrainedModel, group: SequenceGroup, device: torch.device, longest: int = 0
) -> None:
    """Raise UserError, on all ranks, for a model whose hidden states differ between a row in slices and the
    whole row, or whose heads the ranks cannot share.

    The tokens' median error counts: in bf16 a router may send single tokens to other experts. A model that
    mixes neighbouring tokens outside of attention was refused by `check_packing` before.
    """
    if not shares_rows(model):
        raise UserError(
            f"train.sequence_parallel_size: {type(model).__name__} computes every completion in a row of its "
            "own, which cannot be in slices; set it to 1"
        )
    for border in position_borders(model):
        if longest > border.length:
            raise UserError(
                f"train.sequence_parallel_size: {type(model).__name__} encodes positions by the length of a "
                f"sequence where it has more than {border.length} tokens, and a slice of a row does not show "
                f"that; set it to 1, or data.max_length={border.length}"
            )
    random = np.random.default_rng(2)
    high = min(model.config.vocab_size, 1000)
    draw = lambda count: random.integers(0, high, count).tolist()  # noqa: E731
    room = within_positions(model, 33 + group.size)
    prompt = min(13, room // 2)
    completions = min(21, room - prompt), room - prompt
    batch = pack([TokenGroup(draw(prompt), list(map(draw, completions)), []) for _ in range(3)])
    part = slice_of(batch, group.index, group.size).to(device)
    whole = last_hidden(model, batch.to(device), SegmentTable(batch.segments)).float()
    own = last_hidden(model, part, SegmentTable(part.segments, group)).float()
    want = whole[group.index * len(own) :][: len(own)]
    errors = (own[: len(want)] - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-6)
    error = group.largest(errors.median())
    if not error < TOLERANCE.get(model.dtype, 0.1):
        raise UserError(
            f"{type(model).__name__}: on a row in slices its hidden states are off by {error:.2g} "
            "(relative); set train.sequence_parallel_size=1"
        )
