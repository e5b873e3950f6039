"""Attention over packed groups: the prompt once, every completion attends to the prompt and to itself.

It is registered with transformers under NAMES, so that unmodified models use it:

    run_backbone(model, batch, SegmentTable(batch.segments))      model/backbone.py
      |
      |  model(input_ids, position_ids, attention_mask=ones, segments=table)
      v
    transformers' model
      |-- mask functions: create_causal_mask, create_sliding_window_causal_mask, ...
      |      look our name up in AttentionMaskInterface and call MaskRule(mask_function, ...)
      |      -> a MaskRule takes the place of the (N, N) mask
      |
      |-- each layer, with `segments` among its keywords, which no layer reads
      v
    layer's attention: q, k, v projections, rotary embedding
      |      looks our name up in AttentionInterface
      v
    prefix_attention(module, q, k, v, attention_mask=the MaskRule, segments=the table, ...)
      |
      |  AttentionInputs                                           inputs.py
      v
    BACKENDS[name].attend(inputs) -> (1, N, heads, head_dim)       backends.py: sdpa, flex, varlen

The result is exact. A completion's queries meet the prompt's keys and their own, causal and aligned at the
bottom right; the prompt's gradient collects from all its completions. The mask rule is evaluated at
positions in the sequence, not in the row, so that windows and chunks are those of the unmodified model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from madpo.trainer.errors import UserError
from madpo.trainer.model.attention.backends import BACKENDS
from madpo.trainer.model.attention.inputs import AttentionInputs, MaskRule
from madpo.trainer.model.attention.segments import SegmentTable, VarlenIndex
from madpo.trainer.model.families import rescale_queries
from madpo.trainer.sequence_parallel import across_slices

__all__ = ["NAMES", "MaskRule", "SegmentTable", "Unshared", "VarlenIndex", "register", "shares_rows"]

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

HARMLESS_KEYWORDS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "output_attentions",
        "output_router_logits",
        "is_causal",
        "sliding_window",  # in the mask rule already
    }
)
"""Keywords of a layer's call that change neither which keys a query attends to nor how much."""


class Unshared(UserError):
    """This model cannot share a row between sequences, or not in a way that is known."""


def prefix_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, head_dim)
    key: Tensor,  # (1, kv_heads, N, head_dim)
    value: Tensor,  # (1, kv_heads, N, head_dim)
    attention_mask: MaskRule | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: SegmentTable | None = None,
    recorded: list[AttentionInputs] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (heads,)
    *,
    backend: str,
    **others: Any,
) -> tuple[Tensor, None]:  # (1, N, heads, head_dim)
    """Attention of every segment of a packed row, called by transformers' attention layers.

    `recorded` collects the layers' inputs; it is a keyword of the model's forward, like `segments`. Raises
    UserError for parts of an attention that are not known here.
    """
    if segments is None:
        raise Unshared(
            "this model's layers do not hand on to their attention the segment table that the model gets"
        )
    unknown = sorted(name for name in others.keys() - HARMLESS_KEYWORDS if others[name] is not None)
    if unknown:
        raise Unshared(
            f"this model's attention uses {', '.join(unknown)}, which attention over packed groups does "
            "not compute; its log-probs would be wrong"
        )
    if not isinstance(attention_mask, MaskRule):
        raise Unshared(
            "this model forms its attention mask by itself, or none, instead of by transformers' mask "
            "functions; what its tokens see is not known"
        )
    if key.shape[2] != query.shape[2]:
        raise Unshared(
            f"this model's attention has {key.shape[2]} keys for a row of {query.shape[2]} tokens; which "
            "sequence the others belong to is not known"
        )
    assert query.shape[0] == 1, "a packed batch is one row"
    assert not dropout, "attention dropout is off in preference training"
    query = rescale_queries(module, query, segments)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    inputs = AttentionInputs(query, key, value, segments, attention_mask, scale, softcap, s_aux)
    if recorded is not None:
        recorded.append(inputs)
    return BACKENDS[backend].attend(inputs), None


def shares_rows(model: PreTrainedModel) -> bool:
    """Whether the model's attention is ours, so that sequences may share a row and a prompt."""
    name: Any = model.config._attn_implementation
    return name in NAMES.values()


def register() -> None:
    """Make NAMES known to transformers, with a MaskRule in place of masks over the whole row."""
    for backend, name in NAMES.items():
        AttentionInterface.register(name, across_slices(partial(prefix_attention, backend=backend)))
        AttentionMaskInterface.register(name, MaskRule)
