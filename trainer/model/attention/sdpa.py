"""The truth for tests, and the back-end of CPUs: torch's scaled_dot_product_attention, segment by segment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madpo.trainer.model.attention.inputs import Call


def attend(call: Call) -> Tensor:  # (1, N, heads, head_dim)
    # Split, not slice: the backward of a slice fills a whole row for every segment.
    lengths = call.segments.lengths
    queries, keys, values = (x.split(lengths, dim=2) for x in (call.query, call.key, call.value))
    out = []
    for q, k, v, prompt in zip(queries, keys, values, call.segments.prompts, strict=True):
        if prompt is not None:
            k = torch.cat((keys[prompt], k), dim=2)
            v = torch.cat((values[prompt], v), dim=2)
        out.append(_segment(call, q, k, v))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


def _segment(
    call: Call,
    q: Tensor,  # (1, heads, Q, head_dim)
    k: Tensor,  # (1, kv_heads, K, head_dim)
    v: Tensor,  # (1, kv_heads, K, head_dim)
) -> Tensor:  # (1, heads, Q, head_dim)
    written_out = call.softcap is not None or call.sinks is not None
    if call.sight.is_causal and q.shape[2] == k.shape[2] and not written_out:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=call.scale, enable_gqa=call.is_grouped
        )
    mask = call.sight.mask(q.shape[2], k.shape[2], q.device)
    if written_out:
        return _written_out(call, q, k, v, mask)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=call.scale, enable_gqa=call.is_grouped
    )


def _written_out(
    call: Call,
    q: Tensor,  # (1, heads, Q, head_dim)
    k: Tensor,  # (1, kv_heads, K, head_dim)
    v: Tensor,  # (1, kv_heads, K, head_dim)
    mask: Tensor,  # (Q, K)
) -> Tensor:  # (1, heads, Q, head_dim)
    """What SDPA cannot express: soft-caps, and sinks, which take their share of the softmax."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if call.sinks is not None:
        column = call.sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column.to(scores.dtype)), dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : k.shape[2]]
    return weights.to(q.dtype) @ v
