"""The steps that every op is made of, in Triton and in plain torch, and the one place that chooses.

The contract is the same in both and described where the Triton version is: `row_stats`, `dlogits_` and
`scale_` in logit_rows.py, `sequence_sums` and `group_losses` in group_loss.py, `score_groups` in fused_from_logits.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from madpo.kernels.edge_loss import EdgeLoss, edge_loss_ref
from madpo.kernels.layout import Groups, Span
from madpo.kernels.transform import LogitTransform

Impl = Literal["auto", "triton", "torch"]
NARROW = (torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, *NARROW)


@dataclass(frozen=True)
class Steps:
    """One implementation."""

    name: str
    row_stats: Callable[..., None]
    dlogits_: Callable[..., Tensor]
    sequence_sums: Callable[[Tensor, Groups, Span, Tensor], None]
    group_losses: Callable[..., None]
    score_groups: Callable[..., None]
    scale_: Callable[[Tensor, Tensor], Tensor]


def choose_steps(impl: Impl, tensor: Tensor) -> Steps:
    """The implementation for `tensor`'s device. Raises ValueError where Triton cannot run."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl: {impl!r} is not one of auto, triton, torch")
    if impl == "torch" or (impl == "auto" and not (tensor.is_cuda and tensor.dtype in TRITON_DTYPES)):
        return TORCH
    if not tensor.is_cuda and tensor.device.type != "meta" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl: triton needs tensors on a GPU, these are on {tensor.device}; use auto or torch, or set "
            "TRITON_INTERPRET=1 before Python starts to run the kernels slowly on a CPU"
        )
    if tensor.dtype not in TRITON_DTYPES:
        raise ValueError(f"impl: triton takes float32, bfloat16 and float16, not {tensor.dtype}; use torch")
    from madpo.kernels import fused_from_logits, group_loss, logit_rows

    return Steps(
        "triton",
        logit_rows.row_stats,
        logit_rows.dlogits_,
        group_loss.sequence_sums,
        group_loss.group_losses,
        fused_from_logits.score_groups,
        logit_rows.scale_,
    )


@contextmanager
def plainly_on(tensor: Tensor) -> Iterator[None]:
    """On the tensor's device, which Triton would not look for, and without autocast, which would narrow
    what is wide on purpose."""
    kind = tensor.device.type
    autocast = torch.autocast(kind, enabled=False) if kind in ("cuda", "cpu") else nullcontext()
    with torch.cuda.device_of(tensor), autocast:
        yield


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What logits, sums and gradients are formed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def row_stats_ref(
    logits: Tensor,  # (m, C)
    targets: Tensor,  # (m,)
    logps: Tensor,  # (m,)
    normalisers: Tensor | None = None,  # (m,)
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform,
    hits: Tensor | None = None,  # (m,)
    entropies: Tensor | None = None,  # (m,)
    state: Tensor | None = None,  # (3, m)
    first_column: int = 0,
    last: bool = True,
) -> None:
    """`logit_rows.row_stats` in plain torch."""
    z = _transformed(logits, bias, transform, first_column, logps.dtype)
    maximum, total = z.amax(1), torch.zeros_like(logps)
    target_logit = torch.full_like(logps, torch.nan)
    if first_column and state is not None:
        maximum, target_logit = torch.maximum(maximum, state[0]), state[2]
        total = state[1] * (state[0] - maximum).exp()
    e = (z - maximum[:, None]).exp_()
    total = total + e.sum(1)
    columns = targets[:, None] - first_column
    inside = (columns >= 0) & (columns < z.shape[1])
    found = z.gather(1, columns.clamp(0, z.shape[1] - 1))
    target_logit = torch.where(inside, found, target_logit[:, None])[:, 0]
    if not last:
        assert state is not None
        state.copy_(torch.stack((maximum, total, target_logit)))
        return
    torch.sub(target_logit - maximum, total.log(), out=logps)
    if normalisers is not None:
        torch.add(maximum, total.log(), out=normalisers)
    if hits is not None:
        torch.ge(target_logit, maximum, out=hits)
    if entropies is not None:
        moment = (e * (z - maximum[:, None])).nan_to_num_(nan=0.0).sum(1)
        torch.sub(total.log(), moment / total, out=entropies)


def dlogits_ref_(
    logits: Tensor,  # (m, C)
    targets: Tensor,  # (m,)
    normalisers: Tensor,  # (m,)
    slopes: Tensor,  # (m,)
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform,
    dtype: torch.dtype,
    out: Tensor | None = None,  # (m, C)
    first_column: int = 0,
) -> Tensor:
    """`logit_rows.dlogits_` in plain torch; it may wait for the device."""
    z = _transformed(logits, bias, transform, first_column, normalisers.dtype)
    slope = transform.slope(z)
    d = z.clone() if z is logits and out is not None and out is not logits else z
    d.sub_(normalisers[:, None]).exp_().mul_(-slopes[:, None])
    columns = targets[:, None] - first_column
    inside = (columns >= 0) & (columns < d.shape[1])
    d.scatter_add_(1, columns.clamp(0, d.shape[1] - 1), torch.where(inside, slopes[:, None], 0))
    if not isinstance(slope, float) or slope != 1.0:
        d.mul_(slope)
    d.masked_fill_((slopes == 0)[:, None], 0.0)
    return d.to(dtype) if out is None else out.copy_(d)


def _transformed(
    logits: Tensor, bias: Tensor | None, transform: LogitTransform, first: int, dtype: torch.dtype
) -> Tensor:
    x = logits.to(dtype)
    return transform(x if bias is None else x + bias[first : first + x.shape[1]])


def sequence_sums_ref(values: Tensor, groups: Groups, span: Span, sums: Tensor) -> None:
    """`group_loss.sequence_sums` in plain torch."""
    lengths = groups.layout.rows.diff()[span.sequences]
    # unsafe=True skips a check of the lengths that would wait for the device.
    sums[span.sequences] = torch.segment_reduce(
        values[span.rows].double(), "sum", lengths=lengths, initial=0.0, unsafe=True
    )


def group_losses_ref(
    logps: Tensor,  # (S,)
    ref_logps: Tensor | None,  # (S,)
    groups: Groups,
    span: Span,
    loss: EdgeLoss,
    scale: float,
    losses: Tensor,  # (E,)
    slopes: Tensor,  # (M,)
) -> None:
    """`group_loss.group_losses` in plain torch, its slopes by autograd."""
    lengths, first = groups.layout.rows.diff()[span.sequences], span.sequences.start
    with torch.enable_grad():
        leaf = logps[span.sequences].clone().requires_grad_()
        result = edge_loss_ref(
            leaf,
            None if ref_logps is None else ref_logps[span.sequences],
            lengths,
            groups.winners[span.edges] - first,
            groups.losers[span.edges] - first,
            loss,
            span.edges,
        )
        (slope,) = torch.autograd.grad(scale * result.sum(), leaf)
    losses[span.edges] = result.detach().to(losses.dtype)
    slopes[span.rows] = slope.repeat_interleave(lengths, output_size=span.num_rows).to(slopes.dtype)


def score_groups_ref(
    logits: Tensor,  # (M, V)
    ref_logits: Tensor | None,  # (M, V)
    targets: Tensor,  # (M,)
    groups: Groups,
    loss: EdgeLoss,
    scale: float,
    transform: LogitTransform,
    logps: Tensor,  # (M,)
    ref_token_logps: Tensor | None,  # (M,)
    normalisers: Tensor,  # (M,)
    logp_sums: Tensor,  # (S,)
    ref_logps: Tensor | None,  # (S,)
    losses: Tensor,  # (E,)
    slopes: Tensor,  # (M,)
) -> None:
    """`fused_from_logits.score_groups` in plain torch: the other steps one after another."""
    whole = groups.span
    row_stats_ref(logits, targets, logps, normalisers, transform=transform)
    sequence_sums_ref(logps, groups, whole, logp_sums)
    if ref_token_logps is not None:
        if ref_logits is not None:
            row_stats_ref(ref_logits, targets, ref_token_logps, transform=transform)
        assert ref_logps is not None
        sequence_sums_ref(ref_token_logps, groups, whole, ref_logps)
    group_losses_ref(logp_sums, ref_logps, groups, whole, loss, scale, losses, slopes)


def scale_ref_(x: Tensor, factor: Tensor) -> Tensor:
    """`logit_rows.scale_` in plain torch."""
    return x.mul_(factor.to(x.dtype))


TORCH = Steps(
    "torch", row_stats_ref, dlogits_ref_, sequence_sums_ref, group_losses_ref, score_groups_ref, scale_ref_
)


def mm_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, rounded once from the accumulators to out's dtype."""
    if not has_gemm(out, a, b):
        wide = torch.promote_types(wide_dtype(out), wide_dtype(a))
        product = a.to(wide) @ b.to(wide)
        return out.add_(product) if add else out.copy_(product)
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    # The overloads with out_dtype are newer than torch's type stubs.
    kwargs: dict[str, Any] = {"out_dtype": out.dtype, "out": out}
    return torch.addmm(out, a, b, **kwargs) if add else torch.mm(a, b, **kwargs)


def has_gemm(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether torch multiplies these as they are: on a GPU alike dtypes, or narrow ones into float32.

    Not on a CPU: its bfloat16 product has no wide output, and of a strided operand it reads neighbours of
    the last column (seen with torch 2.13).
    """
    if a.dtype != b.dtype:
        return False
    if a.dtype == out.dtype:
        return a.is_cuda or out.dtype == wide_dtype(out)
    return a.is_cuda and a.dtype in NARROW and out.dtype == torch.float32
