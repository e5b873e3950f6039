"""The choice at start-up of how a model attends: by one of our back-ends, or in padded rows by its own."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from madpo.trainer.batches.packing import pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError
from madpo.trainer.model.attention.backends import BACKENDS
from madpo.trainer.model.attention.choice import CANDIDATES, choose
from madpo.trainer.model.attention.inputs import AttentionInputs
from madpo.trainer.model.attention.prefix_sharing import NAMES, SegmentTable, Unshared, shares_rows
from madpo.trainer.model.backbone import run_backbone
from madpo.trainer.model.startup.checks import (
    check_packing,
    failing_in_one_line,
    own_attention,
    set_attention,
)
from madpo.trainer.model.startup.positions import within_positions


def choose_attention(model: PreTrainedModel, wanted: str, device: torch.device, longest: int = 0) -> str:
    """Give the model the back-end for `model.attention`, or its own attention in padded rows if it cannot
    share rows; return a note that says which and why. `longest` is the most tokens that a sequence may have.

    Raises UserError if the scores are exact in neither way, or if the wanted back-end does not compute this
    model's attention.
    """
    try:
        if not shares_rows(model):
            raise Unshared(f"{type(model).__name__} looks its attention up in a table of its own")
        note = f"attention: {_choose_backend(model, wanted, device)}"
        check_packing(model, device, longest)
        return note
    except Unshared as reason:
        before: Any = model.config._attn_implementation
        name = own_attention(model)
        set_attention(model, name)
        try:
            check_packing(model, device, longest)
        except UserError as error:
            set_attention(model, before)
            raise UserError(f"{reason}; nor can it run in rows of its own: {error}") from None
        return (
            f"attention: the model's own ({name}); prompts are not shared, and rows are padded, which "
            f"train.micro_batch_tokens does not count ({reason})"
        )


def _choose_backend(model: PreTrainedModel, wanted: str, device: torch.device) -> str:
    if wanted not in CANDIDATES or (wanted == "auto" and device.type == "cpu"):
        return BACKENDS["sdpa"].label
    choice = choose(recorded_inputs(model, device), wanted)
    model.set_attn_implementation(NAMES[choice.name])
    return str(choice)


@torch.no_grad()
@failing_in_one_line
def recorded_inputs(model: PreTrainedModel, device: torch.device) -> list[AttentionInputs]:
    """The attention inputs of each of the model's layers for a few tokens."""
    ids = list(range(min(model.config.vocab_size, within_positions(model, 16) // 2)))
    batch = pack([TokenGroup(ids, [ids, ids], [])]).to(device)
    recorded = list[AttentionInputs]()
    run_backbone(model, batch, SegmentTable(batch.segments), recorded=recorded)
    return recorded
