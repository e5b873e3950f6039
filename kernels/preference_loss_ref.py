"""The preference head in plain torch: hidden states -> loss and gradients, logits never kept whole.

The truth for tests and the path without a GPU. Work goes in waves of whole groups: logits of at most
`max_rows` rows, log-probs of the targets, the objective on those small vectors, its gradient with
respect to every target's log-prob by autograd, and from that the gradients of hidden states and
weight, all in forward. A group larger than `max_rows` is walked twice in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Wave:
    """A run of whole groups: its scored rows, its sequences, its edges."""

    rows: slice
    sequences: slice
    edges: slice


WaveLoss = Callable[[Tensor, Tensor | None, Wave], Tensor]
"""(token_logps (m,), ref_token_logps (m,) or None, wave) -> sum of the wave's losses, a scalar."""


def plan_waves(
    lengths: Sequence[int],  # (S,) scored rows of each sequence
    group_sequences: Sequence[int],  # (G,) sequences of each group
    group_edges: Sequence[int],  # (G,)
    max_rows: int,
) -> list[Wave]:
    """Consecutive groups, as many in a wave as fit `max_rows`; a larger group is a wave of its own."""
    waves: list[Wave] = []
    row = sequence = edge = 0
    start = (0, 0, 0)
    for sequences, edges in zip(group_sequences, group_edges, strict=True):
        rows = sum(lengths[sequence : sequence + sequences])
        if row > start[0] and row + rows - start[0] > max_rows:
            waves.append(_wave(start, (row, sequence, edge)))
            start = (row, sequence, edge)
        row, sequence, edge = row + rows, sequence + sequences, edge + edges
    if (row, sequence, edge) != start:
        waves.append(_wave(start, (row, sequence, edge)))
    return waves


def _wave(start: tuple[int, int, int], end: tuple[int, int, int]) -> Wave:
    return Wave(slice(start[0], end[0]), slice(start[1], end[1]), slice(start[2], end[2]))


@dataclass(frozen=True)
class HeadArgs:
    """Everything that is not differentiated."""

    need_hidden: bool
    need_weight: bool
    targets: Tensor  # (M,)
    waves: Sequence[Wave]
    wave_loss: WaveLoss
    scale: float
    max_rows: int
    softcap: float | None
    ref_hidden: Tensor | None  # (M, H)
    ref_weight: Tensor | None  # (V, H)


def preference_loss_ref(
    hidden: Tensor,  # (M, H) the positions that predict the targets
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (M,)
    waves: Sequence[Wave],
    wave_loss: WaveLoss,
    *,
    scale: float = 1.0,
    max_rows: int = 4096,
    softcap: float | None = None,
    ref_hidden: Tensor | None = None,  # (M, H)
    ref_weight: Tensor | None = None,  # (V, H)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """scale * sum of the waves' losses, and the log-probs it was formed from.

    Returns (loss (), token_logps (M,), ref_token_logps (M,) or None). Only the loss carries a
    gradient, to `hidden` and `weight`. Logits and sums are float32 (float64 for float64 inputs), the
    gradient of the weight is accumulated in that type and rounded once.
    """
    training = torch.is_grad_enabled()  # an autograd Function cannot tell: it runs without gradients
    args = HeadArgs(
        training and hidden.requires_grad,
        training and weight.requires_grad,
        targets,
        waves,
        wave_loss,
        scale,
        max_rows,
        softcap,
        None if ref_hidden is None else ref_hidden.detach(),
        None if ref_weight is None else ref_weight.detach(),
    )
    loss, logps, ref_logps = PreferenceLossRefFunction.apply(hidden, weight, args)  # type: ignore[misc]
    return loss, logps, ref_logps if ref_hidden is not None else None


class PreferenceLossRefFunction(torch.autograd.Function):
    """Gradients are formed in forward, as soon as a wave's coefficients are known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, args: HeadArgs) -> Any:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = _Head(weight.to(exact), args.softcap)
        ref_head = None
        if args.ref_weight is not None:
            ref_head = _Head(args.ref_weight.to(exact), args.softcap)
        logps = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        normalisers = torch.empty_like(logps)
        ref_logps = torch.empty_like(logps) if ref_head else logps.new_empty(0)
        d_hidden = torch.zeros_like(hidden) if args.need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=exact) if args.need_weight else None
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)

        for wave in args.waves:
            kept = None
            for rows in _chunks(wave.rows, args.max_rows):
                kept = head.logits(hidden[rows])
                logps[rows], normalisers[rows] = target_logps(kept, args.targets[rows])
                if ref_head and args.ref_hidden is not None:
                    ref_logits = ref_head.logits(args.ref_hidden[rows])
                    ref_logps[rows], _ = target_logps(ref_logits, args.targets[rows])
            wave_ref = ref_logps[wave.rows] if ref_head else None
            wave_loss, slopes = _differentiate(args, logps[wave.rows], wave_ref, wave)
            loss += wave_loss
            if not (args.need_hidden or args.need_weight):
                continue
            one_chunk = wave.rows.stop - wave.rows.start <= args.max_rows
            for rows in _chunks(wave.rows, args.max_rows):
                logits = kept if one_chunk and kept is not None else head.logits(hidden[rows])
                slope = slopes[rows.start - wave.rows.start : rows.stop - wave.rows.start]
                d_logits = head.d_logits_(logits, normalisers[rows], args.targets[rows], slope)
                if d_hidden is not None:
                    d_hidden[rows] = (d_logits @ head.weight).to(hidden.dtype)
                if d_weight is not None:
                    d_weight.addmm_(d_logits.T, hidden[rows].to(exact))

        ctx.gradients = d_hidden, None if d_weight is None else d_weight.to(weight.dtype)
        ctx.mark_non_differentiable(logps, ref_logps)
        return loss.to(exact), logps, ref_logps

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        d_hidden, d_weight = ctx.gradients
        ctx.gradients = None
        factor = upstream[0]
        return (
            None if d_hidden is None else d_hidden.mul_(factor.to(d_hidden.dtype)),
            None if d_weight is None else d_weight.mul_(factor.to(d_weight.dtype)),
            None,
        )


def _differentiate(
    args: HeadArgs, logps: Tensor, ref_logps: Tensor | None, wave: Wave
) -> tuple[Tensor, Tensor]:
    """The wave's scaled loss, and its slope with respect to every target's log-prob, (m,)."""
    with torch.enable_grad():
        leaf = logps.clone().requires_grad_()
        loss = args.wave_loss(leaf, ref_logps, wave) * args.scale
        (slopes,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slopes


def _chunks(rows: slice, size: int) -> Iterator[slice]:
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def target_logps(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log softmax(logits)[target] of every row, and its logsumexp: (m, V), (m,) -> (m,), (m,)."""
    normalisers = logits.logsumexp(1)
    return logits.gather(1, targets[:, None])[:, 0] - normalisers, normalisers


@dataclass(frozen=True)
class _Head:
    weight: Tensor  # (V, H) in the accumulation dtype
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(m, H) -> (m, V)"""
        logits = hidden.to(self.weight.dtype) @ self.weight.T
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def d_logits_(self, logits: Tensor, normalisers: Tensor, targets: Tensor, slopes: Tensor) -> Tensor:
        """slope * (1[v = target] - softmax), times the soft-cap's derivative; uses up `logits`."""
        capped = None if self.softcap is None else 1 - (logits / self.softcap).square()
        d = logits.sub_(normalisers[:, None]).exp_().mul_(-slopes[:, None])
        d.scatter_add_(1, targets[:, None], slopes[:, None])
        return d if capped is None else d.mul_(capped)
