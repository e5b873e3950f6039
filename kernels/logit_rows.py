"""Triton kernels over rows of logits: statistics in one read, gradient in one read and one write.

Both give a program one row and walk its columns in blocks. The running maximum is kept per block, so
that an element costs one exp2: with two, the special function units of an H100 could not keep up with its
memory. Sums are float32, offsets int64 (M x V passes 2^31).

Triton compiles a kernel once more for pointers and numbers that 16 does not divide. Only the logits are
worth that: vectors begin wherever a chunk does, and a compilation in the middle of training keeps every
other rank waiting.
"""

# Checkers see a kernel as the function it was written as: no launch options, constants without attributes.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from madpo.kernels.transform import LogitTransform

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e38)  # a running maximum to begin with; -inf would give inf - inf

BLOCK = 4096
SCALE_PROGRAMS = 2048  # about as many as run at once: with a factor of 1 they only start
NUM_WARPS = 8


@triton.jit
def logit(x, TRANSFORM: tl.constexpr):
    """Apply the LogitTransform to x."""
    x = x * TRANSFORM.scale
    if TRANSFORM.softcap is not None:
        x = TRANSFORM.softcap * (2.0 * tl.sigmoid((2.0 / TRANSFORM.softcap) * x) - 1.0)
    return x * (1.0 / TRANSFORM.temperature)


@triton.jit
def load_logits(row, bias, columns, num_columns, TRANSFORM: tl.constexpr, IS_TAIL: tl.constexpr):
    """Load a block of transformed logits in float32, -inf beyond the end of the row.

    Only the tail of a row is masked: a mask would cost the other blocks their wide loads wherever
    `num_columns` is no multiple of 16.
    """
    if IS_TAIL:
        inside = columns < num_columns
        x = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
        if bias is not None:
            x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside, logit(x, TRANSFORM), -float("inf"))
    else:
        x = tl.load(row + columns).to(tl.float32)
        if bias is not None:
            x += tl.load(bias + columns).to(tl.float32)
        z = logit(x, TRANSFORM)
    return z


@triton.jit
def target_logit(row, bias, target, num_columns, TRANSFORM: tl.constexpr):
    """The target's logit; NaN where it is not among these columns."""
    inside = (target >= 0) & (target < num_columns)
    x = tl.load(row + target, mask=inside, other=float("nan")).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + target, mask=inside, other=0.0).to(tl.float32)
    return logit(x, TRANSFORM)


@triton.jit
def fold_block(maximum, sums, moments, z, ENTROPY: tl.constexpr):
    """Fold a block of logits into the running maximum and the sums relative to it."""
    larger = tl.maximum(maximum, tl.max(z, 0))
    rescale = tl.exp2((maximum - larger) * LOG2E)
    e = tl.exp2((z - larger) * LOG2E)
    if ENTROPY:
        moments = (moments + sums * (maximum - larger)) * rescale
        moments += tl.where(e > 0.0, e * (z - larger), 0.0)
    return larger, sums * rescale + e, moments


@triton.jit
def stream_row(
    row,
    bias,
    num_columns,
    maximum,
    total,
    TRANSFORM: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold a row into its maximum m and sum of e^(z - m); also returns the sum of e^(z - m) (z - m).

    `row` and `bias` point to the first column.
    """
    before = maximum
    sums = tl.zeros((BLOCK,), tl.float32)
    moments = tl.zeros((BLOCK,), tl.float32)
    columns = tl.arange(0, BLOCK)
    tail = num_columns // BLOCK * BLOCK
    for start in range(0, tail, BLOCK):
        z = load_logits(row, bias, start + columns, num_columns, TRANSFORM, False)
        maximum, sums, moments = fold_block(maximum, sums, moments, z, ENTROPY)
    if tail < num_columns:
        z = load_logits(row, bias, tail + columns, num_columns, TRANSFORM, True)
        maximum, sums, moments = fold_block(maximum, sums, moments, z, ENTROPY)
    total = total * tl.exp2((before - maximum) * LOG2E) + tl.sum(sums, 0)
    return maximum, total, tl.sum(moments, 0)


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["TARGETS", "LOGPS", "NORMALISERS", "HITS", "ENTROPIES", "STATE"],
)
def _row_stats_kernel(
    LOGITS,  # (m, C)
    BIAS,  # (V,) or None
    TARGETS,  # (m,)
    LOGPS,  # (m,)
    NORMALISERS,  # (m,) or None
    HITS,  # (m,) or None
    ENTROPIES,  # (m,) or None
    STATE,  # (3, m) maximum, sum and target logit so far; None where the columns are all there are
    first_column,
    num_columns,
    row_stride,
    num_rows,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    row = LOGITS + i.to(tl.int64) * row_stride
    bias = BIAS
    if BIAS is not None:
        bias += first_column
    maximum = tl.full((), LOWEST, tl.float32)
    total = 0.0
    z = float("nan")
    if not FIRST:
        maximum = tl.load(STATE + i)
        total = tl.load(STATE + num_rows + i)
        z = tl.load(STATE + 2 * num_rows + i)
    target = tl.load(TARGETS + i) - first_column
    here = (target >= 0) & (target < num_columns)
    z = tl.where(here, target_logit(row, bias, target, num_columns, TRANSFORM), z)
    maximum, total, moment = stream_row(
        row, bias, num_columns, maximum, total, TRANSFORM, ENTROPIES is not None, BLOCK
    )
    if LAST:
        log_total = tl.log(total)
        tl.store(LOGPS + i, (z - maximum) - log_total)
        if NORMALISERS is not None:
            tl.store(NORMALISERS + i, maximum + log_total)
        if HITS is not None:
            tl.store(HITS + i, (z >= maximum).to(tl.int8))
        if ENTROPIES is not None:
            tl.store(ENTROPIES + i, log_total - moment / total)
    else:
        tl.store(STATE + i, maximum)
        tl.store(STATE + num_rows + i, total)
        tl.store(STATE + 2 * num_rows + i, z)


def row_stats(
    logits: Tensor,  # (m, C) columns [first_column, first_column + C) of the vocabulary
    targets: Tensor,  # (m,)
    logps: Tensor,  # (m,) written with the last columns
    normalisers: Tensor | None = None,  # (m,) logsumexp of the transformed logits
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform,
    hits: Tensor | None = None,  # (m,) bool: whether no logit is larger than the target's
    entropies: Tensor | None = None,  # (m,)
    state: Tensor | None = None,  # (3, m) carries the statistics from one set of columns to the next
    first_column: int = 0,
    last: bool = True,
) -> None:
    """log softmax(logits)[target] of every row, in one read of the logits."""
    assert logits.stride(1) == 1 and targets.is_contiguous() and (entropies is None or state is None)
    if not len(logits):
        return
    _row_stats_kernel[(len(logits),)](
        logits,
        bias,
        targets,
        logps,
        normalisers,
        None if hits is None else hits.view(torch.int8),
        entropies,
        state,
        first_column,
        logits.shape[1],
        logits.stride(0),
        len(logits),
        FIRST=first_column == 0,
        LAST=last,
        TRANSFORM=transform,
        BLOCK=BLOCK if entropies is None else BLOCK // 2,  # a third more registers per element
        num_warps=NUM_WARPS,
    )


@triton.jit
def dlogit(z, is_target, normaliser, dloss_dlogp, TRANSFORM: tl.constexpr):
    """dloss_dlogp * (1[target] - softmax), times the derivative of the soft-cap."""
    d = dloss_dlogp * (tl.where(is_target, 1.0, 0.0) - tl.exp2((z - normaliser) * LOG2E))
    if TRANSFORM.softcap is not None:
        tanh = z * (TRANSFORM.temperature / TRANSFORM.softcap)
        d *= 1.0 - tanh * tanh
    return d


@triton.jit(do_not_specialize_on_alignment=["TARGETS", "NORMALISERS", "DLOSS_DLOGPS"])
def _dlogits_kernel(
    LOGITS,  # (m, C)
    DLOGITS,  # (m, C), may be the front part of each row of LOGITS
    BIAS,  # (V,) or None
    TARGETS,  # (m,)
    NORMALISERS,  # (m,)
    DLOSS_DLOGPS,  # (m,)
    first_column,
    num_columns,
    row_stride,
    d_row_stride,
    SHRINKS: tl.constexpr,
    TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0)
    row = LOGITS + i.to(tl.int64) * row_stride
    d_row = DLOGITS + i.to(tl.int64) * d_row_stride
    dloss_dlogp = tl.load(DLOSS_DLOGPS + i)
    if dloss_dlogp == 0.0:
        for start in range(0, num_columns, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            zeros = tl.zeros((BLOCK,), DLOGITS.dtype.element_ty)
            tl.store(d_row + columns, zeros, mask=columns < num_columns)
        return
    bias = BIAS
    if BIAS is not None:
        bias += first_column
    target = (tl.load(TARGETS + i) - first_column).to(tl.int32)
    normaliser = tl.load(NORMALISERS + i)
    dloss_dlogp *= TRANSFORM.scale / TRANSFORM.temperature
    columns = tl.arange(0, BLOCK)
    tail = num_columns // BLOCK * BLOCK
    for start in range(0, tail, BLOCK):
        z = load_logits(row, bias, start + columns, num_columns, TRANSFORM, False)
        d = dlogit(z, start + columns == target, normaliser, dloss_dlogp, TRANSFORM)
        if SHRINKS:
            # Narrow values land where wider ones of this block or an earlier one were: every warp must
            # have read before any writes.
            tl.debug_barrier()
        tl.store(d_row + start + columns, d.to(DLOGITS.dtype.element_ty))
    if tail < num_columns:
        z = load_logits(row, bias, tail + columns, num_columns, TRANSFORM, True)
        d = dlogit(z, tail + columns == target, normaliser, dloss_dlogp, TRANSFORM)
        if SHRINKS:
            tl.debug_barrier()
        inside = tail + columns < num_columns
        tl.store(d_row + tail + columns, d.to(DLOGITS.dtype.element_ty), mask=inside)


def dlogits_(
    logits: Tensor,  # (m, C), overwritten unless `out` is given
    targets: Tensor,  # (m,)
    normalisers: Tensor,  # (m,)
    dloss_dlogps: Tensor,  # (m,)
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform,
    dtype: torch.dtype,
    out: Tensor | None = None,  # (m, C)
    first_column: int = 0,
) -> Tensor:
    """d loss / d (h W^T + bias), (m, C) in `dtype`, in the memory of `logits` unless `out` is given.

    dloss_dlogp * (1[v = target] - softmax) times the transform's derivative, formed in float32. A row
    whose dloss_dlogp is 0 is written without being read.
    """
    shrinks = out is None and dtype != logits.dtype
    if out is None:
        assert dtype.itemsize <= logits.dtype.itemsize
        out = logits.view(dtype)[:, : logits.shape[1]] if shrinks else logits
    assert targets.is_contiguous() and dloss_dlogps.is_contiguous() and logits.stride(1) == out.stride(1) == 1
    if not len(logits):
        return out
    _dlogits_kernel[(len(logits),)](
        logits,
        out,
        bias,
        targets,
        normalisers,
        dloss_dlogps,
        first_column,
        logits.shape[1],
        logits.stride(0),
        out.stride(0),
        SHRINKS=shrinks,
        TRANSFORM=transform,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return out


@triton.jit(do_not_specialize_on_alignment=["FACTOR"])
def _scale_kernel(X, FACTOR, size, BLOCK: tl.constexpr):
    factor = tl.load(FACTOR).to(tl.float32)
    if factor == 1.0:
        return
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, size, tl.num_programs(0) * BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(X + i, mask=i < size, other=0.0).to(tl.float32)
        tl.store(X + i, (x * factor).to(X.dtype.element_ty), mask=i < size)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x *= factor, a scalar on the device; where it is 1, nothing is read or written."""
    assert x.is_contiguous()
    if x.numel():
        grid = (min(triton.cdiv(x.numel(), BLOCK), SCALE_PROGRAMS),)
        _scale_kernel[grid](x, factor, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)
    return x
