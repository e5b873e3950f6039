"""The pairwise losses from logits that exist already: one launch forward, one read and write backward.

A program streams one row of the policy's logits and the same row of the reference's. Whichever program
finishes a group last sums its sequences and forms its edges, in a fixed order: which one it is changes
nothing in the result.
"""

# Checkers see a kernel as the function it was written as: no launch options, constants without attributes.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from madpo.kernels import logit_rows as rows
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.group_loss import edge_terms, group_loss, sum_rows
from madpo.kernels.layout import Groups
from madpo.kernels.logit_rows import LOWEST, stream_row, target_logit
from madpo.kernels.transform import LogitTransform


@triton.jit
def score_row(
    LOGITS, row_stride, i, target, num_columns, LOGPS, TRANSFORM: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the target's log-prob of row i; returns the row's logsumexp."""
    row = LOGITS + i.to(tl.int64) * row_stride
    z = target_logit(row, None, target, num_columns, TRANSFORM)
    lowest = tl.full((), LOWEST, tl.float32)
    maximum, total, _ = stream_row(row, None, num_columns, lowest, 0.0, TRANSFORM, False, BLOCK)
    log_total = tl.log(total)
    tl.store(LOGPS + i, (z - maximum) - log_total)
    return maximum + log_total


@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=[
        "TARGETS",
        "GROUP_OF_ROW",
        "layout",
        "terms",
        "COUNTERS",
        "LOGPS",
        "REF_LOGPS",
        "NORMALISERS",
        "LOGP_SUMS",
        "REF_LOGP_SUMS",
        "LOSSES",
        "SLOPES",
    ],
)
def _score_groups_kernel(
    LOGITS,  # (M, V)
    REF_LOGITS,  # (M, V) or None
    TARGETS,  # (M,)
    GROUP_OF_ROW,  # (M,)
    layout,
    terms,
    COUNTERS,  # (G,) zeros
    LOGPS,  # (M,)
    REF_LOGPS,  # (M,) or None; scored here where there are REF_LOGITS
    NORMALISERS,  # (M,)
    LOGP_SUMS,  # (S,)
    REF_LOGP_SUMS,  # (S,) or None; formed here where there are REF_LOGPS
    LOSSES,  # (E,)
    SLOPES,  # (M,)
    num_rows,
    num_columns,
    row_stride,
    ref_row_stride,
    CURVE: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr,
    TRANSFORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (M + G,): a program per row, and one per group, so that a group without rows is formed too."""
    i = tl.program_id(0)
    g = i - num_rows
    if i < num_rows:
        g = tl.load(GROUP_OF_ROW + i).to(tl.int32)
        target = tl.load(TARGETS + i)
        normaliser = score_row(LOGITS, row_stride, i, target, num_columns, LOGPS, TRANSFORM, BLOCK)
        tl.store(NORMALISERS + i, normaliser)
        if REF_LOGITS is not None:
            score_row(REF_LOGITS, ref_row_stride, i, target, num_columns, REF_LOGPS, TRANSFORM, BLOCK)
    first_sequence, last_sequence = tl.load(layout.sequences + g), tl.load(layout.sequences + g + 1)
    rows = tl.load(layout.rows + last_sequence) - tl.load(layout.rows + first_sequence)
    # Every warp's stores come before the count, and the count before any load of the group's log-probs,
    # which bypass this multiprocessor's own cache.
    tl.debug_barrier()
    finished = tl.atomic_add(COUNTERS + g, 1, sem="acq_rel")
    if finished < rows:
        return
    for s in range(first_sequence, last_sequence):
        start, stop = tl.load(layout.rows + s), tl.load(layout.rows + s + 1)
        tl.store(LOGP_SUMS + s, sum_rows(LOGPS, start, stop, ".cg"))
        if REF_LOGPS is not None:
            tl.store(REF_LOGP_SUMS + s, sum_rows(REF_LOGPS, start, stop, ".cg"))
    tl.debug_barrier()
    group_loss(g, LOGP_SUMS, REF_LOGP_SUMS, layout, terms, LOSSES, SLOPES, CURVE, LENGTH_NORMALISED)


def score_groups(
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
    logp_sums: Tensor,  # (S,) float64
    ref_logps: Tensor | None,  # (S,)
    losses: Tensor,  # (E,)
    slopes: Tensor,  # (M,)
) -> None:
    """Fill the outputs, which begin with `logps`, from the logits.

    `ref_token_logps` is written where there are `ref_logits`, `ref_logps` where there are
    `ref_token_logps`; otherwise they are read.
    """
    assert logits.stride(1) == 1 and (ref_logits is None or ref_logits.stride(1) == 1)
    num_rows, num_groups = len(logits), len(groups.group_sequences)
    if not num_groups:
        return
    _score_groups_kernel[(num_rows + num_groups,)](
        logits,
        ref_logits,
        targets,
        groups.group_of_row,
        groups.layout,
        edge_terms(loss, scale),
        torch.zeros(num_groups, dtype=torch.int32, device=logits.device),
        logps,
        ref_token_logps,
        normalisers,
        logp_sums,
        ref_logps,
        losses,
        slopes,
        num_rows,
        logits.shape[1],
        logits.stride(0),
        0 if ref_logits is None else ref_logits.stride(0),
        CURVE=loss.curve,
        LENGTH_NORMALISED=loss.length_normalised,
        TRANSFORM=transform,
        BLOCK=rows.BLOCK,
        num_warps=rows.NUM_WARPS,
    )
