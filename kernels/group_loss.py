"""Triton kernels from the log-probs of tokens to the losses of edges and the gradient in each log-prob.

One program sums one sequence; one program forms all edges of one group. Every sum has a fixed order and
nothing is added atomically, so two runs agree bit for bit. Sums and the difference of log-ratios are
float64, because that difference is small against the sums. The loss curve is evaluated in float32.
"""

# Checkers see a kernel as the function it was written as: no launch options, constants without attributes.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from madpo.kernels.edge_loss import EdgeLoss, MarginWeight
from madpo.kernels.layout import GroupLayout, GroupRange
from madpo.kernels.stats import PairLosses

ROW_BLOCK = tl.constexpr(1024)
EDGE_BLOCK = tl.constexpr(32)


class EdgeTerms(NamedTuple):
    """The numbers of an `EdgeLoss`, as kernels take them; the form of the loss is a compile-time constant."""

    offsets: Tensor | None  # (E,)
    weights: Tensor | None  # (E,)
    margins: Tensor | None  # (E,)
    beta: float
    offset: float
    positive: float
    negative: float
    c_max: float
    c_min: float
    lam: float
    tau: float
    log_odds: float
    margin_scale: float
    lowest: float
    highest: float
    scale: float


def edge_terms(loss: EdgeLoss, scale: float) -> EdgeTerms:
    """The terms of `loss` times `scale`."""
    weight = loss.margin_weight or MarginWeight(c_max=2.0, c_min=0.5, lam=1.0, tau=1.0)
    offsets, weights, margins = (
        None if vector is None else vector.contiguous()
        for vector in (loss.offsets, loss.weights, loss.margins)
    )
    return EdgeTerms(
        offsets,
        weights,
        margins,
        loss.beta,
        loss.offset,
        loss.positive,
        loss.negative,
        weight.c_max,
        weight.c_min,
        weight.lam,
        weight.tau,
        weight.log_odds,
        weight.margin_scale,
        weight.lowest,
        weight.highest,
        scale,
    )


@triton.jit
def sum_rows(VALUES, start, stop, CACHE: tl.constexpr):
    """float64 sum of VALUES[start:stop]."""
    sums = tl.zeros((ROW_BLOCK,), tl.float64)
    for first in range(start, stop, ROW_BLOCK):
        i = first + tl.arange(0, ROW_BLOCK)
        sums += tl.load(VALUES + i, mask=i < stop, other=0.0, cache_modifier=CACHE).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit(
    do_not_specialize=["first_sequence"],
    do_not_specialize_on_alignment=["VALUES", "ROW_OFFSETS", "SUMS"],
)
def _sequence_sums_kernel(VALUES, ROW_OFFSETS, SUMS, first_sequence):
    s = first_sequence + tl.program_id(0)
    start, stop = tl.load(ROW_OFFSETS + s), tl.load(ROW_OFFSETS + s + 1)
    tl.store(SUMS + s, sum_rows(VALUES, start, stop, ""))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def margin_weight(margin, terms):
    """MarginWeight of float32 margins."""
    h = margin * terms.margin_scale
    gate = tl.sigmoid(-(terms.lam * (tl.abs(h) - terms.tau) + terms.log_odds))
    c = terms.c_min + (terms.c_max - terms.c_min) * gate
    c = tl.minimum(tl.maximum(c, terms.lowest), terms.highest)
    return tl.where(h <= -terms.tau, 1.0, tl.exp(softplus(-h) - softplus(-c * h)))  # NaN stays NaN


@triton.jit
def log_ratio(pairs, ranges, sequences, inside, LENGTH_NORMALISED: tl.constexpr):
    """The float64 log-ratios of a block of sequences, and the lengths they are divided by (else 1)."""
    ratio = tl.load(pairs.logps + sequences, mask=inside, other=0.0)
    if pairs.ref_logps is not None:
        ratio -= tl.load(pairs.ref_logps + sequences, mask=inside, other=0.0).to(tl.float64)
    length = tl.full(sequences.shape, 1.0, tl.float32)
    if LENGTH_NORMALISED:
        start = tl.load(ranges.rows + sequences, mask=inside, other=0)
        stop = tl.load(ranges.rows + sequences + 1, mask=inside, other=1)
        length = tl.maximum(stop - start, 1).to(tl.float32)
        ratio /= length.to(tl.float64)
    return ratio, length


@triton.jit
def curve(z, terms, CURVE: tl.constexpr):
    """The loss at z and its derivative in D."""
    if CURVE == "sigmoid":
        loss = terms.positive * softplus(-z) + terms.negative * softplus(z)
        dloss = terms.beta * (terms.negative * tl.sigmoid(z) - terms.positive * tl.sigmoid(-z))
    elif CURVE == "hinge":
        loss = tl.maximum(1.0 - z, 0.0)
        dloss = tl.where(z < 1.0, -terms.beta, 0.0)
    else:
        tl.static_assert(CURVE == "ipo")
        gap = (z - 0.5) / terms.beta
        loss = gap * gap
        dloss = 2.0 * gap
    return loss, dloss


@triton.jit
def group_loss(
    g,  # the group
    ranges,  # PairRanges
    terms,  # EdgeTerms
    pairs,  # PairLosses
    CURVE: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr,
):
    """Form the losses of all edges of a group, and the gradient in the log-prob of each of its tokens.

    The edges are formed anew for every sequence of the group instead of being added up across
    sequences: a little arithmetic, and no order to get wrong.
    """
    first_edge, last_edge = tl.load(ranges.edges + g), tl.load(ranges.edges + g + 1)
    for s in range(tl.load(ranges.sequences + g), tl.load(ranges.sequences + g + 1)):
        total = tl.zeros((EDGE_BLOCK,), tl.float32)
        for first in range(first_edge, last_edge, EDGE_BLOCK):
            e = first + tl.arange(0, EDGE_BLOCK)
            inside = e < last_edge
            chosen = tl.load(ranges.chosen + e, mask=inside, other=0)
            rejected = tl.load(ranges.rejected + e, mask=inside, other=0)
            chosen_ratio, chosen_length = log_ratio(pairs, ranges, chosen, inside, LENGTH_NORMALISED)
            rejected_ratio, rejected_length = log_ratio(pairs, ranges, rejected, inside, LENGTH_NORMALISED)
            z = (terms.beta * (chosen_ratio - rejected_ratio) - terms.offset).to(tl.float32)
            if terms.offsets is not None:
                z -= tl.load(terms.offsets + e, mask=inside, other=0.0).to(tl.float32)
            loss, dloss = curve(z, terms, CURVE)
            weight = tl.full((EDGE_BLOCK,), 1.0, tl.float32)
            if terms.weights is not None:
                weight *= tl.load(terms.weights + e, mask=inside, other=0.0).to(tl.float32)
            if terms.margins is not None:
                margin = tl.load(terms.margins + e, mask=inside, other=0.0).to(tl.float32)
                weight *= margin_weight(margin, terms)
            tl.store(pairs.losses + e, weight * loss, mask=inside)
            dloss *= weight
            total += tl.where(inside & (chosen == s), dloss / chosen_length, 0.0)
            total -= tl.where(inside & (rejected == s), dloss / rejected_length, 0.0)
        dloss_dlogp = tl.sum(total, 0) * terms.scale
        last_row = tl.load(ranges.rows + s + 1)
        for first in range(tl.load(ranges.rows + s), last_row, ROW_BLOCK):
            i = first + tl.arange(0, ROW_BLOCK)
            values = tl.full((ROW_BLOCK,), 0.0, tl.float32) + dloss_dlogp
            tl.store(pairs.dloss_dlogps + i, values, mask=i < last_row)


@triton.jit(
    do_not_specialize=["first_group"],
    do_not_specialize_on_alignment=["ranges", "terms", "pairs"],
)
def _group_loss_kernel(
    ranges,  # PairRanges
    terms,  # EdgeTerms
    pairs,  # PairLosses
    first_group,
    CURVE: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr,
):
    group_loss(first_group + tl.program_id(0), ranges, terms, pairs, CURVE, LENGTH_NORMALISED)


def sequence_sums(
    values: Tensor,  # (M,)
    groups: GroupLayout,
    group_range: GroupRange,
    sums: Tensor,  # (S,) float64, written for the range's sequences
) -> None:
    """Sum the values of each sequence of the range."""
    sequences, starts = group_range.sequences, groups.ranges.rows
    count = sequences.stop - sequences.start
    if count:
        _sequence_sums_kernel[(count,)](values, starts, sums, sequences.start, num_warps=4)


def group_losses(
    pairs: PairLosses,  # log-probs are read, `losses` and `dloss_dlogps` written, all within the range
    groups: GroupLayout,
    group_range: GroupRange,
    loss: EdgeLoss,
    scale: float,
) -> None:
    """Form the losses of the range's edges, and the gradient in the log-prob of each of its tokens."""
    count = group_range.groups.stop - group_range.groups.start
    if count:
        _group_loss_kernel[(count,)](
            groups.ranges,
            edge_terms(loss, scale),
            pairs,
            group_range.groups.start,
            CURVE=loss.curve,
            LENGTH_NORMALISED=loss.length_normalised,
            num_warps=1,
        )
