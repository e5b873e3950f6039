"""Attention by torch's scaled_dot_product_attention, segment by segment: on CPUs, and the truth for tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madpo.trainer.model.attention.inputs import AttentionInputs


def attend(inputs: AttentionInputs) -> Tensor:  # (1, N, heads, head_dim)
    # Split, not slice: the backward of a slice fills a whole row for every segment.
    lengths = inputs.segments.lengths
    queries, keys, values = (x.split(lengths, dim=2) for x in (inputs.query, inputs.key, inputs.value))
    out = []
    for q, k, v, prompt in zip(queries, keys, values, inputs.segments.prompts, strict=True):
        if prompt is not None:
            k = torch.cat((keys[prompt], k), dim=2)
            v = torch.cat((values[prompt], v), dim=2)
        out.append(_segment(inputs, q, k, v))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


def _segment(
    inputs: AttentionInputs,
    q: Tensor,  # (1, heads, Q, head_dim)
    k: Tensor,  # (1, kv_heads, K, head_dim)
    v: Tensor,  # (1, kv_heads, K, head_dim)
) -> Tensor:  # (1, heads, Q, head_dim)
    written_out = inputs.softcap is not None or inputs.sinks is not None
    if inputs.mask_rule.is_causal and q.shape[2] == k.shape[2] and not written_out:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=inputs.scale, enable_gqa=inputs.is_grouped
        )
    mask = inputs.mask_rule.mask(q.shape[2], k.shape[2], q.device)
    if written_out:
        return _written_out(inputs, q, k, v, mask)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=inputs.scale, enable_gqa=inputs.is_grouped
    )


def _written_out(
    inputs: AttentionInputs,
    q: Tensor,  # (1, heads, Q, head_dim)
    k: Tensor,  # (1, kv_heads, K, head_dim)
    v: Tensor,  # (1, kv_heads, K, head_dim)
    mask: Tensor,  # (Q, K)
) -> Tensor:  # (1, heads, Q, head_dim)
    """Attention in plain torch with what SDPA cannot express: soft-caps, and sinks, which take their share of
    the softmax."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-1, -2) * inputs.scale
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if inputs.sinks is not None:
        column = inputs.sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column.to(scores.dtype)), dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : k.shape[2]]
    return weights.to(q.dtype) @ v
