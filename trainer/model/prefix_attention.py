"""Attention over packed groups: the prompt once, every completion sees the prompt and itself.

Registered in transformers' attention interface under NAMES, so that unmodified models use it; the
segment table travels as the keyword `segments` through the model's forward. Exact: a completion's
queries meet the prompt's keys and their own, causal and aligned at the bottom right, and the
prompt's gradient collects from all its completions. Sliding windows, soft-capping and grouped
queries are handled.

Two back-ends: SDPA per segment, which runs anywhere and is the truth for tests, and one call of
flash-attn's variable-length kernel with the keys gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from madpo.trainer.data.packing import Segment
from madpo.trainer.errors import UserError

NAMES = {"sdpa": "prefix_sharing", "flash": "prefix_sharing_varlen"}
"""The config's `model.attention` -> the name in transformers' attention interface, which takes a name
that holds "sdpa" or "flash" for one of its own and checks the model for it."""


class VarlenIndex(NamedTuple):
    """The segments as flash-attn's variable-length call wants them."""

    keys: Tensor  # (K,) positions of the keys, segment after segment: its prompt's, then its own
    query_offsets: Tensor  # (segments + 1,) int32
    key_offsets: Tensor  # (segments + 1,) int32
    max_queries: int
    max_keys: int


class SegmentTable:
    """The segments of one batch, with the masks that their attention needs, built once each."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)
        self.lengths = [segment.end - segment.start for segment in self.segments]
        index = {segment.start: number for number, segment in enumerate(self.segments)}
        # The number of the segment that is the prompt of each segment; None for a prompt.
        self.prompts = [
            index[s.prompt_start] if s.prompt_end > s.prompt_start else None for s in self.segments
        ]
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        self._varlen: VarlenIndex | None = None

    def varlen(self, device: torch.device) -> VarlenIndex:
        """Offsets and key positions, built from the host's table without a synchronisation."""
        if self._varlen is None:
            keys: list[int] = []
            queries, key_counts = [0], [0]
            for start, end, prompt_start, prompt_end in self.segments:
                keys += [*range(prompt_start, prompt_end), *range(start, end)]
                queries.append(end)
                key_counts.append(len(keys))
            self._varlen = VarlenIndex(
                torch.tensor(keys).to(device, non_blocking=True),
                torch.tensor(queries, dtype=torch.int32).to(device, non_blocking=True),
                torch.tensor(key_counts, dtype=torch.int32).to(device, non_blocking=True),
                max(self.lengths),
                max(s.end - s.start + s.prompt_end - s.prompt_start for s in self.segments),
            )
        return self._varlen

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


def sdpa_prefix_attention(
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
    **others: Any,
) -> tuple[Tensor, None]:  # (1, N, heads, head_dim)
    """Attention of every segment of a packed row. Called by transformers' attention layers."""
    segments = _checked(segments, query, dropout, others)
    grouped = query.shape[1] != key.shape[1]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Split, not slice: the backward of a slice fills a whole row for every segment.
    queries, keys, values = (x.split(segments.lengths, dim=2) for x in (query, key, value))
    out = []
    for q, k, v, prompt in zip(queries, keys, values, segments.prompts, strict=True):
        if prompt is not None:
            k = torch.cat((keys[prompt], k), dim=2)
            v = torch.cat((values[prompt], v), dim=2)
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


def flash_prefix_attention(
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
    **others: Any,
) -> tuple[Tensor, None]:  # (1, N, heads, head_dim)
    """The same by one call of flash-attn's variable-length kernel (flash-attn 2.1 or newer)."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    index = _checked(segments, query, dropout, others).varlen(query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, head_dim)
    out = flash_attn_varlen_func(
        q.contiguous(),
        k.index_select(0, index.keys),
        v.index_select(0, index.keys),
        cu_seqlens_q=index.query_offsets,
        cu_seqlens_k=index.key_offsets,
        max_seqlen_q=index.max_queries,
        max_seqlen_k=index.max_keys,
        softmax_scale=scaling,
        causal=True,  # aligned at the bottom right when a segment has more keys than queries
        window_size=(-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out[None], None


BEARINGS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "is_causal"})
"""Keywords that change nothing about which token sees which, and how much."""


def _checked(
    segments: SegmentTable | None, query: Tensor, dropout: float, others: dict[str, Any]
) -> SegmentTable:
    if segments is None:
        raise UserError(
            "attention over packed groups needs the segment table: call the model with "
            "segments=SegmentTable(...)"
        )
    unknown = sorted(name for name in others.keys() - BEARINGS if others[name] is not None)
    if unknown:
        raise UserError(
            f"this model's attention uses {', '.join(unknown)}, which attention over packed groups does "
            "not compute; its log-probs would be wrong"
        )
    assert query.shape[0] == 1, "a packed batch is one row"
    assert not dropout, "attention dropout is off in preference training"
    return segments


def register() -> None:
    """Make NAMES known to transformers; their mask function builds nothing, the table says it all."""
    for name, function in zip(NAMES.values(), (sdpa_prefix_attention, flash_prefix_attention), strict=True):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)


def require(attention: str) -> None:
    """Raise ValueError if the back-end's package is missing."""
    if attention == "flash" and find_spec("flash_attn") is None:
        raise UserError(
            "model.attention: flash needs the flash-attn package: pip install 'madpo[flash-attn]', "
            "or set model.attention=sdpa"
        )
