"""Attention over packed groups: the prompt once, every completion sees the prompt and itself.

Registered in transformers' attention interface under NAME, so that unmodified models use it; the
segment table travels as the keyword `segments` through the model's forward. Exact: a completion's
queries meet the prompt's keys and their own, causal and aligned at the bottom right, and the
prompt's gradient collects from all its completions. Sliding windows, soft-capping and grouped
queries are handled. This is SDPA per segment, the slow and exact form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from madpo.trainer.data.packing import Segment

NAME = "prefix_sharing"


class SegmentTable:
    """The segments of one batch, with the masks that their attention needs, built once each."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys) bool, True where a query may look; query i stands at keys - queries + i."""
        shape = (queries, keys, window)
        if shape not in self._masks:
            position = torch.arange(keys - queries, keys, device=device)[:, None]
            key = torch.arange(keys, device=device)[None]
            keep = key <= position
            if window is not None:
                keep &= position - key < window
            self._masks[shape] = keep
        return self._masks[shape]


def prefix_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, N, head_dim)
    key: Tensor,  # (1, kv_heads, N, head_dim)
    value: Tensor,  # (1, kv_heads, N, head_dim)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: SegmentTable | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # (1, N, heads, head_dim)
    """Attention of every segment of a packed row. Called by transformers' attention layers."""
    if segments is None:
        raise ValueError(
            f"attention {NAME!r} needs the segment table: call the model with segments=SegmentTable(...)"
        )
    assert query.shape[0] == 1, "a packed batch is one row"
    assert not dropout, "attention dropout is off in preference training"
    grouped = query.shape[1] != key.shape[1]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = []
    for start, end, prompt_start, prompt_end in segments.segments:
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        if prompt_end > prompt_start:
            k = torch.cat((key[:, :, prompt_start:prompt_end], k), dim=2)
            v = torch.cat((value[:, :, prompt_start:prompt_end], v), dim=2)
        mask = segments.mask(q.shape[2], k.shape[2], sliding_window, query.device)
        if softcap is None:
            out.append(
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
            )
        else:
            out.append(_softcapped(q, k, v, mask, scale, softcap))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _softcapped(
    q: Tensor,  # (1, heads, Q, head_dim)
    k: Tensor,  # (1, kv_heads, K, head_dim)
    v: Tensor,  # (1, kv_heads, K, head_dim)
    mask: Tensor,  # (Q, K)
    scale: float,
    softcap: float,
) -> Tensor:  # (1, heads, Q, head_dim)
    """Gemma 2's scores, softcap * tanh(score / softcap), which SDPA cannot express."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def register() -> None:
    """Make NAME known to transformers; its mask function builds nothing, the table says it all."""
    AttentionInterface.register(NAME, prefix_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
