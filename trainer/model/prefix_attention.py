"""Attention over packed groups: the prompt once, every completion sees the prompt and itself.

Registered in transformers' attention interface under NAMES, so that unmodified models use it; the
segment table travels as the keyword `segments` through the model's forward. Exact: a completion's
queries meet the prompt's keys and their own, causal and aligned at the bottom right, and the
prompt's gradient collects from all its completions. Which of these keys a query looks at is the
model's own business: the mask function that it asks transformers to build from travels to its layers
and is evaluated at positions, so that windows and chunks are those of the unmodified model.
Soft-capping, sinks and grouped queries are handled.

Two back-ends: SDPA per segment, which runs anywhere and is the truth for tests, and one call of
flash-attn's variable-length kernel with the keys gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface

from madpo.trainer.data.packing import Segment
from madpo.trainer.errors import UserError
from madpo.trainer.sequence_parallel import SequenceGroup, across_slices

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
    """The segments of one batch, with the masks that their attention needs, built once each; and the ranks
    that share its row, if it is in slices."""

    def __init__(self, segments: Sequence[Segment], group: SequenceGroup | None = None) -> None:
        self.segments, self.group = tuple(segments), group
        self.lengths = [segment.end - segment.start for segment in self.segments]
        index = {segment.start: number for number, segment in enumerate(self.segments)}
        # The number of the segment that is the prompt of each segment; None for a prompt.
        self.prompts = [
            index[s.prompt_start] if s.prompt_end > s.prompt_start else None for s in self.segments
        ]
        self._varlen: VarlenIndex | None = None
        self._positions: Tensor | None = None

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
                max(map(_num_keys, self.segments)),
            )
        return self._varlen

    def positions(self, device: torch.device) -> Tensor:
        """(N,) the position of every token in its own sequence."""
        if self._positions is None:
            places = [i for s in self.segments for i in range(_prompt_length(s), _num_keys(s))]
            self._positions = torch.tensor(places).to(device, non_blocking=True)
        return self._positions


def _prompt_length(segment: Segment) -> int:
    return segment.prompt_end - segment.prompt_start


def _num_keys(segment: Segment) -> int:
    return segment.end - segment.start + _prompt_length(segment)


class Sight:
    """What the tokens of a layer see of their own sequence, as the model says: causal, a window, chunks.

    Built once per forward and kind of layer, by the model, through transformers' mask functions.
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
        window_alone = local_size is None or local_size == getattr(config, "sliding_window", None)
        self.is_window = window_alone and not use_vmap  # which is set where a model alters the usual masks
        self._masks: dict[tuple[int, int], Tensor] = {}

    def mask(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """(queries, keys) bool, True where a query looks; query i stands at keys - queries + i."""
        shape = (queries, keys)
        if shape not in self._masks:
            position = torch.arange(keys, device=device)
            keep = self.mask_function(0, 0, position[keys - queries :, None], position[None])
            self._masks[shape] = keep.expand(shape)
        return self._masks[shape]


def sdpa_prefix_attention(
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
    **others: Any,
) -> tuple[Tensor, None]:  # (1, N, heads, head_dim)
    """Attention of every segment of a packed row. Called by transformers' attention layers."""
    segments, sight = _checked(segments, attention_mask, query, dropout, others)
    query = _tempered(module, query, segments)
    grouped = query.shape[1] != key.shape[1]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # Split, not slice: the backward of a slice fills a whole row for every segment.
    queries, keys, values = (x.split(segments.lengths, dim=2) for x in (query, key, value))
    out = []
    for q, k, v, prompt in zip(queries, keys, values, segments.prompts, strict=True):
        if prompt is not None:
            k = torch.cat((keys[prompt], k), dim=2)
            v = torch.cat((values[prompt], v), dim=2)
        mask = sight.mask(q.shape[2], k.shape[2], query.device)
        if softcap is None and s_aux is None:
            out.append(
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
            )
        else:
            out.append(_written_out(q, k, v, mask, scale, softcap, s_aux))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _written_out(
    q: Tensor,  # (1, heads, Q, head_dim)
    k: Tensor,  # (1, kv_heads, K, head_dim)
    v: Tensor,  # (1, kv_heads, K, head_dim)
    mask: Tensor,  # (Q, K)
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # (heads,)
) -> Tensor:  # (1, heads, Q, head_dim)
    """What SDPA cannot express: Gemma 2's scores, softcap * tanh(score / softcap), and gpt-oss' sinks, a
    score of each head that stands beside those of the keys, takes its share of the softmax and adds nothing.
    """
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column.to(scores.dtype)), dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : k.shape[2]]
    return weights.to(q.dtype) @ v


def _tempered(module: Any, query: Tensor, segments: SegmentTable) -> Tensor:
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


def flash_prefix_attention(
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
    **others: Any,
) -> tuple[Tensor, None]:  # (1, N, heads, head_dim)
    """The same by one call of flash-attn's variable-length kernel (flash-attn 2.1 or newer)."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    segments, sight = _checked(segments, attention_mask, query, dropout, others)
    if s_aux is not None or not sight.is_window:
        what = "attention sinks" if s_aux is not None else "masks other than causal ones and sliding windows"
        raise UserError(f"model.attention: flash does not compute this model's {what}; set it to sdpa")
    query = _tempered(module, query, segments)
    index = segments.varlen(query.device)
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
        window_size=(-1, -1) if sight.local_size is None else (sight.local_size - 1, 0),
        softcap=softcap or 0.0,
    )
    return out[None], None


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


def _checked(
    segments: SegmentTable | None,
    attention_mask: Sight | Tensor | None,
    query: Tensor,
    dropout: float,
    others: dict[str, Any],
) -> tuple[SegmentTable, Sight]:
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
    if not isinstance(attention_mask, Sight):
        raise UserError(
            "this model forms its attention mask by itself, or none, instead of by transformers' mask "
            "functions; what its tokens see is not known"
        )
    assert query.shape[0] == 1, "a packed batch is one row"
    assert not dropout, "attention dropout is off in preference training"
    return segments, attention_mask


def register() -> None:
    """Make NAMES known to transformers, with Sight in place of masks over the whole row."""
    for name, function in zip(NAMES.values(), (sdpa_prefix_attention, flash_prefix_attention), strict=True):
        AttentionInterface.register(name, across_slices(function))
        AttentionMaskInterface.register(name, Sight)


def require(attention: str) -> None:
    """Raise ValueError if the back-end's package is missing."""
    if attention == "flash" and find_spec("flash_attn") is None:
        raise UserError(
            "model.attention: flash needs the flash-attn package: pip install 'madpo[flash-attn]', "
            "or set model.attention=sdpa"
        )
