"""The pairwise losses from existing logits, in one launch: scores, sums and losses together.

A program streams one row of the policy's logits and one of the reference's. The program that finishes a
group last sums its sequences and forms its edges, in a fixed order, so it does not matter which one it is.
"""

# Checkers see a kernel as the function it was written as: no launch options, constants without attributes.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from madpo.kernels import logit_rows
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.group_loss import edge_terms, group_loss, sum_rows
from madpo.kernels.layout import GroupLayout
from madpo.kernels.logit_rows import LOWEST, stream_row, target_logit
from madpo.kernels.stats import LogitStats, PairLosses
from madpo.kernels.transform import LogitTransform


@triton.jit
def score_row(
    LOGITS, row_stride, i, target, num_columns, LOGPS, TRANSFORM: tl.constexpr, BLOCK: tl.constexpr
):
    """Store the log-prob of row i's target; return the row's logsumexp."""
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
        "ranges",
        "terms",
        "COUNTERS",
        "stats",
        "pairs",
    ],
)
def _score_groups_kernel(
    LOGITS,  # (M, V)
    REF_LOGITS,  # (M, V) or None
    TARGETS,  # (M,)
    GROUP_OF_ROW,  # (M,)
    ranges,  # PairRanges
    terms,  # EdgeTerms
    COUNTERS,  # (G,) zeros
    stats,  # LogitStats; ref_token_logps are scored here where there are REF_LOGITS
    pairs,  # PairLosses; ref_logps are formed here where there are ref_token_logps
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
        logps = stats.token_logps
        normaliser = score_row(LOGITS, row_stride, i, target, num_columns, logps, TRANSFORM, BLOCK)
        tl.store(stats.normalisers + i, normaliser)
        if REF_LOGITS is not None:
            ref_logps = stats.ref_token_logps
            score_row(REF_LOGITS, ref_row_stride, i, target, num_columns, ref_logps, TRANSFORM, BLOCK)
    first_sequence, last_sequence = tl.load(ranges.sequences + g), tl.load(ranges.sequences + g + 1)
    rows = tl.load(ranges.rows + last_sequence) - tl.load(ranges.rows + first_sequence)
    # Every warp's stores come before the count, and the count before any load of the group's log-probs,
    # which bypass this multiprocessor's own cache.
    tl.debug_barrier()
    finished = tl.atomic_add(COUNTERS + g, 1, sem="acq_rel")
    if finished < rows:
        return
    for s in range(first_sequence, last_sequence):
        start, stop = tl.load(ranges.rows + s), tl.load(ranges.rows + s + 1)
        tl.store(pairs.logps + s, sum_rows(stats.token_logps, start, stop, ".cg"))
        if stats.ref_token_logps is not None:
            tl.store(pairs.ref_logps + s, sum_rows(stats.ref_token_logps, start, stop, ".cg"))
    tl.debug_barrier()
    group_loss(g, ranges, terms, pairs, CURVE, LENGTH_NORMALISED)


def score_groups(
    logits: Tensor,  # (M, V)
    ref_logits: Tensor | None,  # (M, V)
    targets: Tensor,  # (M,)
    groups: GroupLayout,
    loss: EdgeLoss,
    scale: float,
    transform: LogitTransform,
    stats: LogitStats,
    pairs: PairLosses,
) -> None:
    """Fill `stats` and `pairs` from the logits.

    `ref_token_logps` are written where there are `ref_logits`, `ref_logps` where there are
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
        groups.ranges,
        edge_terms(loss, scale),
        torch.zeros(num_groups, dtype=torch.int32, device=logits.device),
        stats,
        pairs,
        num_rows,
        logits.shape[1],
        logits.stride(0),
        0 if ref_logits is None else ref_logits.stride(0),
        CURVE=loss.curve,
        LENGTH_NORMALISED=loss.length_normalised,
        TRANSFORM=transform,
        BLOCK=logit_rows.BLOCK,
        num_warps=logit_rows.NUM_WARPS,
    )
