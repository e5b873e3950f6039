"""The choice at start-up of how a model attends: by one of our back-ends, or in padded rows by its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from madpo.trainer.batches.packing import pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError, on_one_line
from madpo.trainer.model.attention.backends import BACKENDS
from madpo.trainer.model.attention.choice import CANDIDATES, choose
from madpo.trainer.model.attention.inputs import AttentionInputs
from madpo.trainer.model.attention.prefix_sharing import NAMES, SegmentTable, Unshared, shares_rows
from madpo.trainer.model.backbone import run_backbone
from madpo.trainer.model.startup.checks import check_packing, own_attention, set_attention
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
        with _failures_as_unshared(model):
            note = f"attention: {_choose_backend(model, wanted, device)}"
            check_packing(model, device, longest)
        return note
    except Unshared as reason:
        before: Any = model.config._attn_implementation
        name = own_attention(model)
        set_attention(model, name)
        try:
            with _failures_as_unshared(model):
                check_packing(model, device, longest)
        except UserError as error:
            set_attention(model, before)
            raise UserError(f"{reason}; nor can it run in rows of its own: {error}") from None
        return (
            f"attention: the model's own ({name}); prompts are not shared, and rows are padded, which "
            f"train.micro_batch_tokens does not count ({reason})"
        )


@contextmanager
def _failures_as_unshared(model: PreTrainedModel) -> Iterator[None]:
    """Raise Unshared for what the model's own code raises, while inside.

    It may do arithmetic with its mask, for one, in whose place it is given a MaskRule.
    """
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unshared(
            f"{type(model).__name__} fails in the check of packed rows ({type(error).__name__}: "
            f"{on_one_line(error)[:150]})"
        ) from error


def _choose_backend(model: PreTrainedModel, wanted: str, device: torch.device) -> str:
    if wanted not in CANDIDATES or (wanted == "auto" and device.type == "cpu"):
        return BACKENDS["sdpa"].label
    choice = choose(recorded_inputs(model, device), wanted)
    model.set_attn_implementation(NAMES[choice.name])
    return str(choice)


@torch.no_grad()
def recorded_inputs(model: PreTrainedModel, device: torch.device) -> list[AttentionInputs]:
    """The attention inputs of each of the model's layers for a few tokens."""
    ids = list(range(min(model.config.vocab_size, within_positions(model, 16) // 2)))
    batch = pack([TokenGroup(ids, [ids, ids], [])]).to(device)
    recorded = list[AttentionInputs]()
    run_backbone(model, batch, SegmentTable(batch.segments), recorded=recorded)
    return recorded
