"""Attention over packed groups: the prompt once, every completion sees the prompt and itself.

Registered in transformers' attention interface under NAMES, so that unmodified models use it; the
segment table travels as the keyword `segments` through the model's forward. Exact: a completion's
queries meet the prompt's keys and their own, causal and aligned at the bottom right, and the
prompt's gradient collects from all its completions. Which of these keys a query looks at is the
model's own business: the mask function that it asks transformers to build from travels to its layers
and is evaluated at positions, so that windows and chunks are those of the unmodified model.

What computes it is one of the back-ends in `attention/`; `choice.py` there says which.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from madpo.trainer.errors import UserError
from madpo.trainer.model.attention.backends import BACKENDS
from madpo.trainer.model.attention.inputs import Call, Sight
from madpo.trainer.model.attention.segments import SegmentTable, VarlenIndex
from madpo.trainer.model.families import tempered
from madpo.trainer.sequence_parallel import across_slices

__all__ = ["NAMES", "SegmentTable", "Sight", "Unshared", "VarlenIndex", "register", "shares_rows"]

NAMES = {
    "sdpa": "prefix_sharing",
    "flex": "prefix_sharing_blocks",
    "torch": "prefix_sharing_varlen",
    "flash2": "prefix_sharing_varlen_2",
    "flash3": "prefix_sharing_varlen_3",
    "flash4": "prefix_sharing_varlen_4",
}
"""A back-end -> its name in transformers' attention interface, which takes a name that holds "sdpa" or
"flash" for one of its own and checks the model for it."""

BEARINGS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "is_causal",
        "sliding_window",  # as in the mask
    }
)
"""Keywords that change nothing, or nothing more, about which token sees which, and how much."""


class Unshared(UserError):
    """This model cannot share a row between sequences, or not in a way that is known."""


def prefix_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, head_dim)
    key: Tensor,  # (1, kv_heads, N, head_dim)
    value: Tensor,  # (1, kv_heads, N, head_dim)
    attention_mask: Sight | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: SegmentTable | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (heads,)
    *,
    backend: str,
    **others: Any,
) -> tuple[Tensor, None]:  # (1, N, heads, head_dim)
    """Attention of every segment of a packed row. Called by transformers' attention layers.

    Raises UserError for parts of an attention that are not known here.
    """
    if segments is None:
        raise UserError(
            "attention over packed groups needs the segment table: call the model with "
            "segments=SegmentTable(...)"
        )
    unknown = sorted(name for name in others.keys() - BEARINGS if others[name] is not None)
    if unknown:
        raise Unshared(
            f"this model's attention uses {', '.join(unknown)}, which attention over packed groups does "
            "not compute; its log-probs would be wrong"
        )
    if not isinstance(attention_mask, Sight):
        raise Unshared(
            "this model forms its attention mask by itself, or none, instead of by transformers' mask "
            "functions; what its tokens see is not known"
        )
    assert query.shape[0] == 1, "a packed batch is one row"
    assert not dropout, "attention dropout is off in preference training"
    query = tempered(module, query, segments)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    call = Call(query, key, value, segments, attention_mask, scale, softcap, s_aux)
    if segments.survey is not None:
        segments.survey.append(call)
    return BACKENDS[backend].attend(call), None


def shares_rows(model: PreTrainedModel) -> bool:
    """Whether the model's attention is ours, so that sequences may share a row and a prompt."""
    name: Any = model.config._attn_implementation
    return name in NAMES.values()


def register() -> None:
    """Make NAMES known to transformers, with Sight in place of masks over the whole row."""
    for backend, name in NAMES.items():
        AttentionInterface.register(name, across_slices(partial(prefix_attention, backend=backend)))
        AttentionMaskInterface.register(name, Sight)
