"""What a back-end is given for one layer: queries, keys and values of a packed row, and the mask rule."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import causal_mask_function

from madpo.trainer.model.attention.segments import SegmentTable


class MaskRule:
    """Which keys of its own sequence a query attends to, by the model's own rule: causal, a window, chunks.

    Transformers' mask functions build one in place of a mask, once per forward and kind of layer. It also
    caches the masks that back-ends make of it.
    """

    def __init__(
        self,
        mask_function: Callable[..., Tensor],  # (batch, head, query position, key position) -> attends
        config: PreTrainedConfig,
        local_size: int | None = None,
        use_vmap: bool = False,
        **others: Any,
    ) -> None:
        self.mask_function, self.local_size = mask_function, local_size
        self.is_causal = mask_function is causal_mask_function
        window_alone = local_size is None or local_size == getattr(config, "sliding_window", None)
        # A window reaches back from the query, and not past it. use_vmap: the model alters the usual masks.
        self.is_window = window_alone and not use_vmap
        self.cache: dict[Hashable, Any] = {}

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(queries, keys) bool, True where a query attends to a key; query i is at keys - queries + i."""
        shape = (queries, keys)
        if shape not in self.cache:
            position = torch.arange(keys, device=device)
            attends = self.mask_function(0, 0, position[keys - queries :, None], position[None])
            self.cache[shape] = attends.expand(shape)
        return self.cache[shape]


@dataclass(frozen=True)
class AttentionInputs:
    """One layer's attention over one packed row."""

    query: Tensor  # (1, heads, N, head_dim)
    key: Tensor  # (1, kv_heads, N, head_dim)
    value: Tensor  # (1, kv_heads, N, head_dim)
    segments: SegmentTable
    mask_rule: MaskRule
    scale: float
    softcap: float | None = None  # scores become softcap * tanh(score / softcap), as in Gemma 2
    sinks: Tensor | None = None  # (heads,) scores beside those of the keys, which add nothing, as in gpt-oss

    @property
    def is_grouped(self) -> bool:
        """Whether several heads of queries share one of keys and values."""
        return self.query.shape[1] != self.key.shape[1]

    @property
    def kind(self) -> Hashable:
        """Equal for inputs that differ in their tokens alone, so that one trial of a kernel serves all."""
        rule, shapes = self.mask_rule, (self.query.shape[1], self.key.shape[1], *self.query.shape[3:])
        masks = (rule.is_causal, rule.is_window, rule.local_size)
        return *shapes, self.query.dtype, self.scale, self.softcap, self.sinks is not None, masks
