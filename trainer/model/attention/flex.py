"""Attention by torch's FlexAttention: the model's own mask function, over the blocks of the row where any
query attends to any key.

It computes whatever a mask function can say, soft-caps and sinks too. On CPUs it has no gradient.
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

from madpo.trainer.model.attention.inputs import AttentionInputs
from madpo.trainer.model.attention.segments import SegmentTable, on_device

BLOCK = 128
COMPILATIONS = 64
"""Most kernels that one process may need: for each kind of layer, with and without gradients, for one block
or more. Beyond its own limit of 8 torch runs unfused, with no more than a line in the log."""


def attend(inputs: AttentionInputs) -> Tensor:  # (1, N, heads, head_dim)
    tokens = inputs.query.shape[2]
    mask = block_mask(inputs)
    padding = (0, 0, 0, mask.seq_lengths[0] - tokens)
    out: Any = _function(inputs.query.device)(
        *(F.pad(x, padding) for x in (inputs.query, inputs.key, inputs.value)),
        score_mod=None if inputs.softcap is None else _capped(inputs.softcap),
        block_mask=mask,
        scale=inputs.scale,
        enable_gqa=inputs.is_grouped,
        return_aux=None if inputs.sinks is None else AuxRequest(lse=True),
    )
    if inputs.sinks is not None:
        out, aux = out
        # The softmax without the sink, times the share of it that the sink leaves.
        share = torch.sigmoid(aux.lse - inputs.sinks[None, :, None].float())
        out = (out * share[..., None]).to(inputs.query.dtype)
    return out[:, :, :tokens].transpose(1, 2).contiguous()


def problem(inputs: AttentionInputs) -> str | None:
    """Why FlexAttention cannot compute these inputs, as far as is known without a trial."""
    if inputs.query.device.type == "cpu":
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


def block_mask(inputs: AttentionInputs) -> BlockMask:
    """The mask of a row that is padded to whole blocks; built once per row and mask rule.

    The padding is a sequence of its own, so that no query is without a key.
    """
    table, rule, device = inputs.segments, inputs.mask_rule, inputs.query.device
    if table in rule.cache:
        return rule.cache[table]
    row = _PaddedRow(table)
    segment, prompt_start, prompt_end, position = (on_device(x, device) for x in row.tokens)

    def attends(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_segment = segment[query] == segment[key]
        in_prompt = (key >= prompt_start[query]) & (key < prompt_end[query])
        return (in_segment | in_prompt) & rule.mask_function(batch, head, position[query], position[key])

    partial, full = row.blocks()
    if not rule.is_causal:  # another mask function has to be asked for each pair
        partial, full = partial | full, np.zeros_like(full)
    lists = [on_device(x, device) for x in (*_key_blocks(partial), *_key_blocks(full))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        rule.cache[table] = BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=BLOCK, mask_mod=attends, seq_lengths=(row.length, row.length)
        )
    return rule.cache[table]


class _PaddedRow:
    """A table's tokens and blocks; the padding of the last block is one more segment."""

    def __init__(self, table: SegmentTable) -> None:
        tokens = int(table.bounds[-1, 1])
        self.length = -(-tokens // BLOCK) * BLOCK
        padding = np.array([[tokens, self.length, tokens, tokens]] if self.length > tokens else [], np.int64)
        self.bounds = np.concatenate((table.bounds, padding.reshape(-1, 4)))
        own = range(len(self.bounds))
        # The segment that is each segment's prompt, or itself.
        self.prompts = [
            number if prompt is None else prompt
            for number, prompt in zip(own, (*table.prompts, None), strict=False)
        ]
        position = np.concatenate((table.positions, np.arange(self.length - tokens)))
        number = np.arange(len(self.bounds))
        start, end, prompt_start, prompt_end = self.bounds.T
        # (tokens,) each: segment, its prompt's start and end, position in the sequence.
        self.tokens = *(np.repeat(x, end - start) for x in (number, prompt_start, prompt_end)), position

    def blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """(B, B) bool each: where a causal mask lets some, and where it lets all queries of a block attend to
        the keys of a block."""
        count = self.length // BLOCK
        partial, full = np.zeros((2, count, count), dtype=bool)
        earlier = np.tri(count, k=-1, dtype=bool)
        for start, end, prompt_start, prompt_end in self.bounds.tolist():
            touched, inside = _touched(start, end), _inside(start, end)
            partial[touched, touched] = True
            partial[touched, _touched(prompt_start, prompt_end)] = True
            adjoining = prompt_end == start and prompt_end > prompt_start  # the first completion
            full[inside, _inside(prompt_start if adjoining else start, end)] = True
        owners = zip(self.prompts, self.bounds.tolist(), strict=True)
        for prompt, run in groupby(owners, key=lambda owner: owner[0]):
            members = [bounds for _, bounds in run]  # the prompt, and completions behind each other
            queries = _inside(members[0][0], members[-1][1])
            full[queries, _inside(*self.bounds[prompt, :2].tolist())] = True
        partial &= earlier | np.eye(count, dtype=bool)
        full &= earlier
        return partial & ~full, full


def _touched(start: int, end: int) -> slice:
    """The blocks that hold any of the tokens start .. end - 1."""
    return slice(start // BLOCK, -(-end // BLOCK) if end > start else start // BLOCK)


def _inside(start: int, end: int) -> slice:
    """The blocks that hold tokens start .. end - 1 and no others."""
    first = -(-start // BLOCK)
    return slice(first, max(first, end // BLOCK))


def _key_blocks(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(1, 1, B) the number of key blocks of each query block, and (1, 1, B, B) their indices, those that
    count first; int32."""
    order = np.argsort(~blocks, axis=1, kind="stable")
    return blocks.sum(1, dtype=np.int32)[None, None], order.astype(np.int32)[None, None]
