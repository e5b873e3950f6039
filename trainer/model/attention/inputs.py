"""One layer's attention over one packed row: what every back-end is given."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import causal_mask_function

from madpo.trainer.model.attention.segments import SegmentTable


class Sight:
    """What the tokens of a layer see of their own sequence, as the model says: causal, a window, chunks.

    Built once per forward and kind of layer, by the model, through transformers' mask functions. What the
    back-ends make of it for one row is kept with it.
    """

    def __init__(
        self,
        mask_function: Callable[..., Tensor],  # (batch, head, query position, key position) -> sees it
        config: PreTrainedConfig,
        local_size: int | None = None,
        use_vmap: bool = False,
        **others: Any,
    ) -> None:
        self.mask_function, self.local_size = mask_function, local_size
        self.is_causal = mask_function is causal_mask_function
        window_alone = local_size is None or local_size == getattr(config, "sliding_window", None)
        # Any tokens before and none after; use_vmap is set where a model alters the usual masks.
        self.is_window = window_alone and not use_vmap
        self.kept: dict[Hashable, Any] = {}

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(queries, keys) bool, True where a query looks; query i stands at keys - queries + i."""
        shape = (queries, keys)
        if shape not in self.kept:
            position = torch.arange(keys, device=device)
            keep = self.mask_function(0, 0, position[keys - queries :, None], position[None])
            self.kept[shape] = keep.expand(shape)
        return self.kept[shape]


@dataclass(frozen=True)
class Call:
    query: Tensor  # (1, heads, N, head_dim)
    key: Tensor  # (1, kv_heads, N, head_dim)
    value: Tensor  # (1, kv_heads, N, head_dim)
    segments: SegmentTable
    sight: Sight
    scale: float
    softcap: float | None = None  # scores become softcap * tanh(score / softcap), as in Gemma 2
    sinks: Tensor | None = None  # (heads,) scores beside those of the keys, which add nothing, as in gpt-oss

    @property
    def is_grouped(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]

    @property
    def kind(self) -> Hashable:
        """Equal for calls that a kernel can tell apart by their tokens alone."""
        sight, shapes = self.sight, (self.query.shape[1], self.key.shape[1], *self.query.shape[3:])
        seen = (sight.is_causal, sight.is_window, sight.local_size)
        return *shapes, self.query.dtype, self.scale, self.softcap, self.sinks is not None, seen
