"""Log-probs of targets with a gradient, from logits or from hidden states, for any objective outside.

The loss is not known here, so the slope of a token arrives with backward. From hidden states that means
to form the logits twice, 8 M H V operations instead of the preference head's 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from madpo.kernels.layout import padded, row_chunks
from madpo.kernels.steps import Impl, Steps, check_columns, choose_steps, mm_into, wide_dtype
from madpo.kernels.transform import IDENTITY, LogitTransform


class TokenLogps(NamedTuple):
    """Only `logps` carries a gradient. float32 (float64 for float64 inputs)."""

    logps: Tensor  # (M,) log softmax(logits)[target]
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
    steps: Steps


def token_logps(
    logits: Tensor,  # (M, V)
    targets: Tensor,  # (M,) in [0, V)
    *,
    transform: LogitTransform = IDENTITY,
    entropy: bool = False,
    inplace_backward: bool = False,
    impl: Impl = "auto",
) -> TokenLogps:
    """Log-probs of the targets, in one read of the logits; backward reads and writes them once.

    With `inplace_backward` the gradient takes the memory of the logits, which are lost then.
    Raises ValueError where `impl` cannot run.
    """
    check_columns("logits", logits)
    steps = choose_steps(impl, logits)
    args = TokenArgs(targets.contiguous(), transform, entropy, inplace_backward, 0, steps)
    return TokenLogps(*TokenLogpsFunction.apply(logits, args))  # type: ignore[misc]


class TokenLogpsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, args: TokenArgs) -> Any:
        out = _empty(args, logits)
        args.steps.row_stats(
            logits,
            args.targets,
            out.logps,
            out.normalisers,
            transform=args.transform,
            hits=out.hits,
            entropies=out.entropies,
        )
        ctx.save_for_backward(logits, out.normalisers)
        ctx.args = args
        _only_logps_differentiable(ctx, out)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        logits, normalisers = ctx.saved_tensors
        args: TokenArgs = ctx.args
        d_logits = args.steps.dlogits_(
            logits,
            args.targets,
            normalisers,
            upstream[0].contiguous(),
            transform=args.transform,
            dtype=logits.dtype,
            out=logits if args.inplace_backward else torch.empty_like(logits),
        )
        if args.inplace_backward:
            increment_version(logits)  # so that whoever needs the logits later gets torch's error
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

    Differentiable in `hidden`, `weight` and `bias` with any upstream gradient.
    Raises ValueError where `impl` cannot run.
    """
    steps = choose_steps(impl, hidden)
    args = TokenArgs(targets.contiguous(), transform, entropy, True, budget_bytes, steps)
    return TokenLogps(*LinearTokenLogpsFunction.apply(hidden, weight, bias, args))  # type: ignore[misc]


class LinearTokenLogpsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, args: TokenArgs) -> Any:
        out = _empty(args, hidden)
        for rows in _chunks(hidden, weight, args):
            args.steps.row_stats(
                _logits(hidden[rows], weight),
                args.targets[rows],
                out.logps[rows],
                out.normalisers[rows],
                bias=bias,
                transform=args.transform,
                hits=out.hits[rows],
                entropies=None if out.entropies is None else out.entropies[rows],
            )
        ctx.save_for_backward(hidden, weight, bias, out.normalisers)
        ctx.args = args
        _only_logps_differentiable(ctx, out)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        hidden, weight, bias, normalisers = ctx.saved_tensors
        args: TokenArgs = ctx.args
        need_hidden, need_weight, need_bias, _ = ctx.needs_input_grad
        wide, chunks = wide_dtype(hidden), _chunks(hidden, weight, args)
        sum_dtype = weight.dtype if len(chunks) == 1 else wide
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.empty_like(weight, dtype=sum_dtype) if need_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if need_bias else None
        for index, rows in enumerate(chunks):
            d_logits = args.steps.dlogits_(
                _logits(hidden[rows], weight),
                args.targets[rows],
                normalisers[rows],
                upstream[0][rows].contiguous(),
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
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype) if chunks else d_weight.zero_().to(weight.dtype)
        return d_hidden, d_weight, None if d_bias is None else d_bias.to(bias.dtype), None


def _empty(args: TokenArgs, like: Tensor) -> TokenLogps:
    vector = like.new_empty(len(args.targets), dtype=wide_dtype(like))
    return TokenLogps(
        vector,
        torch.empty_like(vector),
        torch.empty_like(vector, dtype=torch.bool),
        torch.empty_like(vector) if args.entropy else None,
    )


def _only_logps_differentiable(ctx: Any, out: TokenLogps) -> None:
    ctx.mark_non_differentiable(*(x for x in out[1:] if x is not None))


def _chunks(hidden: Tensor, weight: Tensor, args: TokenArgs) -> list[slice]:
    return row_chunks(len(hidden), len(weight), args.budget_bytes, wide_dtype(hidden).itemsize)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(m, H), (V, H) -> (m, V) in the wide type."""
    logits = hidden.new_empty(len(hidden), padded(len(weight)), dtype=wide_dtype(hidden))
    return mm_into(logits[:, : len(weight)], hidden, weight.T)
