"""How a model attends, settled before the first step: the back-end, or rows of their own; and checked."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from madpo.trainer.batches.packing import pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError
from madpo.trainer.model.attention.backends import BACKENDS
from madpo.trainer.model.attention.choice import CANDIDATES, choose
from madpo.trainer.model.attention.inputs import Call
from madpo.trainer.model.attention.prefix_sharing import NAMES, SegmentTable, Unshared
from madpo.trainer.model.backbone import run_backbone
from madpo.trainer.model.startup.checks import check_packing, own_attention


def settle_attention(model: PreTrainedModel, wanted: str, device: torch.device) -> str:
    """Give the model the back-end for `model.attention`, or, if it cannot share rows, rows of its own; a
    line that says which and why. Raises UserError if the scores are not exact either way, or the back-end
    that is wanted does not compute this model's attention."""
    try:
        note = f"attention: {_settle_backend(model, wanted, device)}"
        check_packing(model, device)
        return note
    except Unshared as reason:
        before, name = model.config._attn_implementation, own_attention(model)
        model.set_attn_implementation(name)
        try:
            check_packing(model, device)
        except UserError:
            model.set_attn_implementation(before)  # pyright: ignore[reportArgumentType]
            raise reason from None
        return (
            f"attention: the model's own ({name}); prompts are not shared, and rows are padded, which "
            f"train.micro_batch_tokens does not count ({reason})"
        )


def _settle_backend(model: PreTrainedModel, wanted: str, device: torch.device) -> str:
    if wanted not in CANDIDATES or (wanted == "auto" and device.type == "cpu"):
        return BACKENDS["sdpa"].label
    choice = choose(survey(model, device), wanted)
    model.set_attn_implementation(NAMES[choice.name])
    return str(choice)


@torch.no_grad()
def survey(model: PreTrainedModel, device: torch.device) -> list[Call]:
    """The calls that the model's layers make for a few tokens."""
    ids = list(range(min(model.config.vocab_size, 8)))
    batch = pack([TokenGroup(ids, [ids, ids], [])]).to(device)
    table = SegmentTable(batch.segments)
    table.survey = []
    run_backbone(model, batch, table)
    return table.survey
