"""Differentiable log-probs of targets, from logits or from hidden states, for any loss.

The loss is not known here: its gradient in each log-prob arrives with backward. From hidden states the
logits are therefore formed twice, 8 M H V operations instead of the preference head's 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from madpo.kernels.checks import require_columns, require_head, require_targets
from madpo.kernels.chunks import padded, row_chunks
from madpo.kernels.gemm import mm_into, wide_dtype
from madpo.kernels.primitives import Impl, Primitives, choose_primitives, device_without_autocast
from madpo.kernels.transform import IDENTITY, LogitTransform


class TokenLogps(NamedTuple):
    """Only `token_logps` carries a gradient. float32 (float64 for float64 inputs)."""

    token_logps: Tensor  # (M,) log softmax(logits)[target]
    normalisers: Tensor  # (M,) logsumexp of the logits
    hits: Tensor  # (M,) bool: whether no logit is larger than the target's
    entropies: Tensor | None  # (M,) of the softmax, in nats; on request


@dataclass(frozen=True)
class TokenArgs:
    """Everything that is not differentiated."""

    targets: Tensor  # (M,)
    transform: LogitTransform
    entropy: bool
    inplace_backward: bool
    budget_bytes: int
    primitives: Primitives


def token_logps(
    logits: Tensor,  # (M, V) the positions that predict the targets
    targets: Tensor,  # (M,) in [0, V)
    *,
    transform: LogitTransform = IDENTITY,
    entropy: bool = False,
    inplace_backward: bool = False,
    impl: Impl = "auto",
) -> TokenLogps:
    """Log-probs of the targets, in one read of the logits; backward reads and writes them once.

    With `inplace_backward` the gradient overwrites the logits.
    Raises ValueError for shapes and dtypes that contradict each other, for a target outside [0, V) (on a GPU
    an assertion on the device fails), and where `impl` cannot run.
    """
    require_columns("logits", logits)
    require_targets(targets, logits, logits.shape[1])
    primitives = choose_primitives(impl, logits)
    args = TokenArgs(targets.contiguous(), transform, entropy, inplace_backward, 0, primitives)
    return TokenLogps(*TokenLogpsFunction.apply(logits, args))  # type: ignore[misc]


class TokenLogpsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: TokenArgs) -> Any:
        out = _empty(args, logits)
        with device_without_autocast(logits):
            args.primitives.row_stats(
                logits,
                args.targets,
                out.token_logps,
                out.normalisers,
                transform=args.transform,
                hits=out.hits,
                entropies=out.entropies,
            )
        ctx.save_for_backward(logits, out.normalisers)
        ctx.args = args
        _only_token_logps_differentiable(ctx, out)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, normalisers = ctx.saved_tensors
        args: TokenArgs = ctx.args
        with device_without_autocast(logits):
            d_logits = args.primitives.dlogits_(
                logits,
                args.targets,
                normalisers,
                upstream[0].contiguous(),
                transform=args.transform,
                dtype=logits.dtype,
                out=logits if args.inplace_backward else torch.empty_like(logits),
            )
        if args.inplace_backward:
            increment_version(logits)  # torch then raises its error for anyone who needs the logits later
        return d_logits, None


def linear_token_logps(
    hidden: Tensor,  # (M, H) the positions that predict the targets
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (M,) in [0, V)
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = IDENTITY,
    entropy: bool = False,
    budget_bytes: int = 2**31,
    impl: Impl = "auto",
) -> TokenLogps:
    """`token_logps` of hidden W^T + bias, with at most `budget_bytes` of float32 logits at once.

    Differentiable in `hidden`, `weight` and `bias` with any upstream gradient. Rows and weight are as in
    `preference_loss`. Raises ValueError as `token_logps` does, and for a sharded weight.
    """
    require_head(hidden, weight, bias, targets)
    primitives = choose_primitives(impl, hidden)
    args = TokenArgs(targets.contiguous(), transform, entropy, True, budget_bytes, primitives)
    return TokenLogps(*LinearTokenLogpsFunction.apply(hidden, weight, bias, args))  # type: ignore[misc]


class LinearTokenLogpsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, args: TokenArgs) -> Any:
        with device_without_autocast(hidden):
            out = linear_token_logps_fwd(hidden, weight, bias, args)
        ctx.save_for_backward(hidden, weight, bias, out.normalisers)
        ctx.args = args
        _only_token_logps_differentiable(ctx, out)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, normalisers = ctx.saved_tensors
        with device_without_autocast(hidden):
            return *linear_token_logps_bwd(
                hidden, weight, bias, normalisers, upstream[0], ctx.args, ctx.needs_input_grad[:3]
            ), None


def linear_token_logps_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, args: TokenArgs
) -> TokenLogps:
    out, logits = _empty(args, hidden), _Logits(hidden, weight, args)
    for rows in logits.chunks:
        args.primitives.row_stats(
            logits.form(rows),
            args.targets[rows],
            out.token_logps[rows],
            out.normalisers[rows],
            bias=bias,
            transform=args.transform,
            hits=out.hits[rows],
            entropies=None if out.entropies is None else out.entropies[rows],
        )
    return out


def linear_token_logps_bwd(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    normalisers: Tensor,  # (M,)
    upstream: Tensor,  # (M,)
    args: TokenArgs,
    needs: tuple[bool, ...],  # gradients of hidden, weight, bias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    wide, device, logits = wide_dtype(hidden), hidden.device, _Logits(hidden, weight, args)
    d_hidden = torch.empty(hidden.shape, dtype=wide, device=device) if needs[0] else None
    sum_dtype = weight.dtype if len(logits.chunks) == 1 else wide
    d_weight = torch.empty(weight.shape, dtype=sum_dtype, device=device) if needs[1] else None
    d_bias = torch.zeros(len(weight), dtype=wide, device=device) if needs[2] else None
    for index, rows in enumerate(logits.chunks):
        d_logits = args.primitives.dlogits_(
            logits.form(rows),
            args.targets[rows],
            normalisers[rows],
            upstream[rows].contiguous(),
            bias=bias,
            transform=args.transform,
            dtype=hidden.dtype,
        )
        if d_hidden is not None:
            mm_into(d_hidden[rows], d_logits, weight)
        if d_weight is not None:
            mm_into(d_weight, d_logits.T, hidden[rows], add=index > 0)
        if d_bias is not None:
            d_bias += d_logits.sum(0, dtype=wide)
    if d_weight is not None and not logits.chunks:
        d_weight.zero_()
    return (
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        None if d_weight is None else d_weight.to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


class _Logits:
    """Forms the logits of one chunk of rows at a time, always in the same memory."""

    def __init__(self, hidden: Tensor, weight: Tensor, args: TokenArgs) -> None:
        self.hidden, self.weight, wide = hidden, weight, wide_dtype(hidden)
        self.chunks = row_chunks(len(hidden), len(weight), args.budget_bytes, wide.itemsize)
        most = max((rows.stop - rows.start for rows in self.chunks), default=0)
        self.memory = hidden.new_empty(most, padded(len(weight)), dtype=wide)

    def form(self, rows: slice) -> Tensor:
        """(m, V) the logits of these rows, in the wide dtype."""
        logits = self.memory[: rows.stop - rows.start, : len(self.weight)]
        return mm_into(logits, self.hidden[rows], self.weight.T)


def _empty(args: TokenArgs, like: Tensor) -> TokenLogps:
    vector = like.new_empty(len(args.targets), dtype=wide_dtype(like))
    return TokenLogps(
        vector,
        torch.empty_like(vector),
        torch.empty_like(vector, dtype=torch.bool),
        torch.empty_like(vector) if args.entropy else None,
    )


def _only_token_logps_differentiable(ctx: Any, out: TokenLogps) -> None:
    ctx.mark_non_differentiable(*(x for x in out[1:] if x is not None))
