"""Sequence parallelism: a group of ranks computes a packed row together, each rank a slice of its tokens.

All layers except attention look at one token at a time and run on the slice. Before attention an all-to-all
exchanges all heads of a rank's tokens for some heads of all tokens, and afterwards another one reverses it.
So the attention function sees the whole row with all its segments, and fewer heads.
Source: Jacobs et al. 2023, DeepSpeed Ulysses (arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from madpo.trainer.errors import UserError
from madpo.trainer.waiting import waited


@dataclass(frozen=True)
class SequenceGroup:
    """Consecutive ranks that share their packed rows."""

    ranks: dist.ProcessGroup
    size: int
    index: int  # of this rank in the group, and of its slice in the row

    def to_heads(self, *rows: Tensor) -> list[Tensor]:
        """Exchange all heads of this slice's tokens for this rank's heads of all tokens, in one collective.

        (1, heads, N / size, head_dim) each -> (1, heads / size, N, head_dim) each.
        """
        parts = [row[0].unflatten(0, (self.size, -1)) for row in rows]
        flat = self._exchange(torch.cat([part.flatten(1) for part in parts], dim=1))
        received = flat.split([part[0].numel() for part in parts], dim=1)
        return [
            own.unflatten(1, part.shape[1:]).transpose(0, 1).flatten(1, 2)[None]
            for own, part in zip(received, parts, strict=True)
        ]

    def to_tokens(self, out: Tensor) -> Tensor:
        """Undo `to_heads`: (1, N, heads / size, head_dim) -> (1, N / size, heads, head_dim)."""
        received = self._exchange(out[0].unflatten(0, (self.size, -1)))
        return received.transpose(0, 1).flatten(1, 2)[None]

    def gather(self, vectors: Sequence[Tensor | None], own: Tensor, total: int) -> list[Tensor | None]:
        """Join the slices' vectors (m,) into vectors (total,), equal on every rank of the group.

        `own` (m,) are the indices of this rank's values in the whole; None stays None.
        """
        given = torch.stack([vector for vector in vectors if vector is not None])
        table = given.new_zeros(len(given), total)
        table[:, own] = given
        with waited():
            dist.all_reduce(table, group=self.ranks)
        whole = iter(table.unbind())
        return [None if vector is None else next(whole) for vector in vectors]

    def largest(self, value: Tensor) -> float:
        """The largest of the ranks' values ()."""
        value = value.clone()
        with waited():
            dist.all_reduce(value, dist.ReduceOp.MAX, group=self.ranks)
        return float(value)

    def _exchange(self, x: Tensor) -> Tensor:
        return _AllToAll.apply(x.contiguous(), self.ranks)  # type: ignore[return-value]


@cache
def join(size: int, timeout_minutes: float) -> SequenceGroup | None:
    """This rank's group of `size` consecutive ranks; None for size 1, where ranks share no rows.

    All ranks call it. Raises UserError if `size` does not divide their number.
    """
    if size == 1:
        return None
    world = dist.get_world_size()
    if world % size:
        raise UserError(
            f"train.sequence_parallel_size: {world} ranks do not form groups of {size}; start a multiple of "
            f"{size} ranks, or set a divisor of {world}"
        )
    ranks, _ = dist.new_subgroups(size, timeout=timedelta(minutes=timeout_minutes))
    assert isinstance(ranks, dist.ProcessGroup)
    return SequenceGroup(ranks, size, dist.get_rank() % size)


class _AllToAll(torch.autograd.Function):
    """All-to-all: part i of x (size, ...) goes to rank i, part i of the result comes from rank i."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: dist.ProcessGroup) -> Tensor:
        ctx.ranks = ranks
        received = torch.empty_like(x)
        with waited():
            dist.all_to_all_single(received, x, group=ranks)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _AllToAll.apply(gradient.contiguous(), ctx.ranks), None  # type: ignore[return-value]


def across_slices(attention: Callable[..., tuple[Tensor, None]]) -> Callable[..., tuple[Tensor, None]]:
    """Extend an attention function to shared rows: those whose segment table names a sequence group."""

    # Compiled, the collective would be traced as an operation without a gradient.
    @torch.compiler.disable
    def in_slices(
        group: SequenceGroup,
        module: nn.Module,
        query: Tensor,  # (1, heads, N / size, head_dim)
        key: Tensor,  # (1, kv_heads, N / size, head_dim)
        value: Tensor,  # (1, kv_heads, N / size, head_dim)
        *args: Any,
        **options: Any,
    ) -> tuple[Tensor, None]:  # (1, N / size, heads, head_dim)
        assert query.shape[0] == 1, "a packed batch is one row"
        _check_heads(query, key, group.size)
        copies = max(group.size // key.shape[1], 1)  # a rank needs one head of keys at the least
        key, value = (x.repeat_interleave(copies, dim=1) if copies > 1 else x for x in (key, value))
        if options.get("s_aux") is not None:  # a number for each head
            options["s_aux"] = options["s_aux"].chunk(group.size)[group.index]
        out, _ = attention(module, *group.to_heads(query, key, value), *args, **options)
        return group.to_tokens(out), None

    @wraps(attention)
    def either(*args: Any, **options: Any) -> Any:
        group = getattr(options.get("segments"), "group", None)
        return attention(*args, **options) if group is None else in_slices(group, *args, **options)

    return either


def _check_heads(query: Tensor, key: Tensor, size: int) -> None:
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % size or (kv_heads % size and size % kv_heads):
        fitting = [n for n in range(1, heads + 1) if not (heads % n or (kv_heads % n and n % kv_heads))]
        raise UserError(
            f"train.sequence_parallel_size: {size} ranks cannot share {heads} heads, {kv_heads} of keys and "
            f"values, evenly; this model allows {', '.join(map(str, fitting))}"
        )
