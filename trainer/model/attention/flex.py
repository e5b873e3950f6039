"""By torch's FlexAttention: the model's own mask, at any blocks of the row that can see each other.

Whatever a mask function can say is computed, soft-caps and sinks too. On CPUs there is no gradient.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from madpo.trainer.model.attention.inputs import Call
from madpo.trainer.model.attention.segments import SegmentTable, on_device

BLOCK = 128
COMPILATIONS = 64
"""Kernels that one process may need: per kind of layer, with and without gradients, for one block or more.
torch's limit of 8 would have the others run unfused, with a line in the log."""


def attend(call: Call) -> Tensor:  # (1, N, heads, head_dim)
    tokens = call.query.shape[2]
    mask = block_mask(call)
    padding = (0, 0, 0, mask.seq_lengths[0] - tokens)
    out: Any = _function(call.query.device)(
        *(F.pad(x, padding) for x in (call.query, call.key, call.value)),
        score_mod=None if call.softcap is None else _capped(call.softcap),
        block_mask=mask,
        scale=call.scale,
        enable_gqa=call.is_grouped,
        return_aux=None if call.sinks is None else AuxRequest(lse=True),
    )
    if call.sinks is not None:
        out, aux = out
        # The softmax without the sink, times the share of it that the sink leaves.
        share = torch.sigmoid(aux.lse - call.sinks[None, :, None].float())
        out = (out * share[..., None]).to(call.query.dtype)
    return out[:, :, :tokens].transpose(1, 2).contiguous()


def problem(call: Call) -> str | None:
    """Why it does not compute the call, as far as is known before it is tried."""
    if call.query.device.type == "cpu":
        return "torch has no gradient of it on CPUs"
    return None


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Any, head: Any, query: Any, key: Any) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@functools.cache
def _compiled() -> Callable[..., Any]:
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, COMPILATIONS)
    return torch.compile(flex_attention, dynamic=True)


def _function(device: torch.device) -> Callable[..., Any]:
    if device.type == "cpu" or torch.compiler.is_compiling():
        return flex_attention
    return _compiled()


def block_mask(call: Call) -> BlockMask:
    """What each token of the row sees, the row filled up to whole blocks; built once per row and sight.

    What fills it up is a sequence of its own, so that no query is without a key.
    """
    table, sight, device = call.segments, call.sight, call.query.device
    if table in sight.kept:
        return sight.kept[table]
    row = _Row(table)
    number, first, last, place = (on_device(x, device) for x in row.tokens)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = number[query] == number[key]
        of_prompt = (key >= first[query]) & (key < last[query])
        return (own | of_prompt) & sight.mask_function(batch, head, place[query], place[key])

    some, whole = row.blocks()
    if not sight.is_causal:  # what a block sees in whole is known of causal masks only
        some, whole = some | whole, np.zeros_like(whole)
    lists = [on_device(x, device) for x in (*_listed(some), *_listed(whole))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        sight.kept[table] = BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(row.length, row.length)
        )
    return sight.kept[table]


class _Row:
    """A table's tokens and blocks, with what fills the last block."""

    def __init__(self, table: SegmentTable) -> None:
        tokens = int(table.bounds[-1, 1])
        self.length = -(-tokens // BLOCK) * BLOCK
        filling = np.array([[tokens, self.length, tokens, tokens]] if self.length > tokens else [], np.int64)
        self.bounds = np.concatenate((table.bounds, filling.reshape(-1, 4)))
        own = range(len(self.bounds))
        self.prompts = [
            number if prompt is None else prompt
            for number, prompt in zip(own, (*table.prompts, None), strict=False)
        ]
        place = np.concatenate((table.places, np.arange(self.length - tokens)))
        number = np.arange(len(self.bounds))
        start, end, first, last = self.bounds.T
        self.tokens = *(np.repeat(x, end - start) for x in (number, first, last)), place

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """(B, B) bool each: which blocks of queries and keys see each other in part, and in whole, by a
        causal mask."""
        count = self.length // BLOCK
        some, whole = np.zeros((2, count, count), dtype=bool)
        earlier = np.tri(count, k=-1, dtype=bool)
        for start, end, first, last in self.bounds.tolist():
            queries, inside = _touched(start, end), _within(start, end)
            some[queries, queries] = True
            some[queries, _touched(first, last)] = True
            adjoining = last == start and last > first  # the first completion, behind its prompt
            whole[inside, _within(first if adjoining else start, end)] = True
        owners = zip(self.prompts, self.bounds.tolist(), strict=True)
        for prompt, run in groupby(owners, key=lambda owner: owner[0]):
            of_prompt = [bounds for _, bounds in run]  # it, and completions behind each other
            queries = _within(of_prompt[0][0], of_prompt[-1][1])
            whole[queries, _within(*self.bounds[prompt, :2].tolist())] = True
        some &= earlier | np.eye(count, dtype=bool)
        whole &= earlier
        return some & ~whole, whole


def _touched(start: int, end: int) -> slice:
    """The blocks that hold any of the tokens start .. end - 1."""
    return slice(start // BLOCK, -(-end // BLOCK) if end > start else start // BLOCK)


def _within(start: int, end: int) -> slice:
    """The blocks that hold nothing else."""
    first = -(-start // BLOCK)
    return slice(first, max(first, end // BLOCK))


def _listed(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(1, 1, B) how many key blocks each query block has, and (1, 1, B, B) which, those first; int32."""
    order = np.argsort(~blocks, axis=1, kind="stable")
    return blocks.sum(1, dtype=np.int32)[None, None], order.astype(np.int32)[None, None]
