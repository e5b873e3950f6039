"""What is known of single model families and of no other, each with its reason."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from madpo.trainer.model.attention.segments import SegmentTable


def tempered(module: Any, query: Tensor, segments: SegmentTable) -> Tensor:
    """Llama 4 scales the queries of layers without rotary embedding by the logarithm of their place in the
    row, or in a slice of it, where it means the position: exchange the one for the other."""
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query

    def scale(place: Tensor) -> Tensor:
        return torch.log1p(torch.floor((place + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    tokens = query.shape[2]
    slices = 1 if segments.group is None else segments.group.size
    rows = torch.arange(tokens, device=query.device) % (tokens // slices)
    exchange = scale(segments.positions(query.device)) / scale(rows)
    return (query * exchange[:, None]).to(query.dtype)
