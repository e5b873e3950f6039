"""Triton kernels from log-probs of tokens to the losses of edges and the slopes of rows.

One program sums one sequence; one program forms all edges of one group. Every sum has a fixed order and
nothing is added atomically, so two runs agree bit for bit. Sums and the difference of log-ratios are
float64, because that difference is small against the sums; the curve on it is float32.
"""

# Checkers see a kernel as the function it was written as: no launch options, constants without attributes.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from madpo.kernels.edge_loss import EdgeLoss, MarginWeight
from madpo.kernels.layout import Groups, Span

ROW_BLOCK = tl.constexpr(1024)
EDGE_BLOCK = tl.constexpr(32)


class EdgeTerms(NamedTuple):
    """What differs from edge to edge or run to run; the form of the loss is a compile-time constant."""

    offsets: Tensor | None  # (E,)
    weights: Tensor | None  # (E,)
    margins: Tensor | None  # (E,)
    beta: float
    offset: float
    positive: float
    negative: float
    c_max: float
    c_min: float
    steepness: float
    tau: float
    log_odds: float
    margin_scale: float
    lowest: float
    highest: float
    scale: float


def edge_terms(loss: EdgeLoss, scale: float) -> EdgeTerms:
    """`loss` times `scale` as the kernels take it."""
    weight = loss.margin_weight or MarginWeight(c_max=2.0, c_min=0.5, steepness=1.0, tau=1.0)
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
        weight.steepness,
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
    gate = tl.sigmoid(-(terms.steepness * (tl.abs(h) - terms.tau) + terms.log_odds))
    c = terms.c_min + (terms.c_max - terms.c_min) * gate
    c = tl.minimum(tl.maximum(c, terms.lowest), terms.highest)
    return tl.where(h <= -terms.tau, 1.0, tl.exp(softplus(-h) - softplus(-c * h)))  # NaN stays NaN


@triton.jit
def log_ratio(LOGPS, REF_LOGPS, ROW_OFFSETS, sequences, inside, LENGTH_NORMALISED: tl.constexpr):
    """Log-ratios of some sequences, float64, and what their slopes are divided by."""
    ratio = tl.load(LOGPS + sequences, mask=inside, other=0.0)
    if REF_LOGPS is not None:
        ratio -= tl.load(REF_LOGPS + sequences, mask=inside, other=0.0).to(tl.float64)
    length = tl.full(sequences.shape, 1.0, tl.float32)
    if LENGTH_NORMALISED:
        start = tl.load(ROW_OFFSETS + sequences, mask=inside, other=0)
        stop = tl.load(ROW_OFFSETS + sequences + 1, mask=inside, other=1)
        length = tl.maximum(stop - start, 1).to(tl.float32)
        ratio /= length.to(tl.float64)
    return ratio, length


@triton.jit
def curve(z, terms, CURVE: tl.constexpr):
    """The loss at z and its slope with respect to D."""
    if CURVE == "sigmoid":
        loss = terms.positive * softplus(-z) + terms.negative * softplus(z)
        slope = terms.beta * (terms.negative * tl.sigmoid(z) - terms.positive * tl.sigmoid(-z))
    elif CURVE == "hinge":
        loss = tl.maximum(1.0 - z, 0.0)
        slope = tl.where(z < 1.0, -terms.beta, 0.0)
    else:
        tl.static_assert(CURVE == "ipo")
        gap = (z - 0.5) / terms.beta
        loss = gap * gap
        slope = 2.0 * gap
    return loss, slope


@triton.jit
def group_loss(
    g,  # the group
    LOGPS,  # (S,)
    REF_LOGPS,  # (S,) or None
    layout,
    terms,
    LOSSES,  # (E,)
    SLOPES,  # (M,)
    CURVE: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr,
):
    """All edges of a group: their losses, and the slope of every row of its sequences.

    The edges are formed anew for every sequence of the group instead of being added up across
    sequences: a little arithmetic, and no order to get wrong.
    """
    first_edge, last_edge = tl.load(layout.edges + g), tl.load(layout.edges + g + 1)
    for s in range(tl.load(layout.sequences + g), tl.load(layout.sequences + g + 1)):
        total = tl.zeros((EDGE_BLOCK,), tl.float32)
        for first in range(first_edge, last_edge, EDGE_BLOCK):
            e = first + tl.arange(0, EDGE_BLOCK)
            inside = e < last_edge
            winner = tl.load(layout.chosen + e, mask=inside, other=0)
            loser = tl.load(layout.rejected + e, mask=inside, other=0)
            won, won_length = log_ratio(LOGPS, REF_LOGPS, layout.rows, winner, inside, LENGTH_NORMALISED)
            lost, lost_length = log_ratio(LOGPS, REF_LOGPS, layout.rows, loser, inside, LENGTH_NORMALISED)
            z = (terms.beta * (won - lost) - terms.offset).to(tl.float32)
            if terms.offsets is not None:
                z -= tl.load(terms.offsets + e, mask=inside, other=0.0).to(tl.float32)
            loss, slope = curve(z, terms, CURVE)
            weight = tl.full((EDGE_BLOCK,), 1.0, tl.float32)
            if terms.weights is not None:
                weight *= tl.load(terms.weights + e, mask=inside, other=0.0).to(tl.float32)
            if terms.margins is not None:
                margin = tl.load(terms.margins + e, mask=inside, other=0.0).to(tl.float32)
                weight *= margin_weight(margin, terms)
            tl.store(LOSSES + e, weight * loss, mask=inside)
            slope *= weight
            total += tl.where(inside & (winner == s), slope / won_length, 0.0)
            total -= tl.where(inside & (loser == s), slope / lost_length, 0.0)
        row_slope = tl.sum(total, 0) * terms.scale
        last_row = tl.load(layout.rows + s + 1)
        for first in range(tl.load(layout.rows + s), last_row, ROW_BLOCK):
            i = first + tl.arange(0, ROW_BLOCK)
            tl.store(SLOPES + i, tl.full((ROW_BLOCK,), 0.0, tl.float32) + row_slope, mask=i < last_row)


@triton.jit(
    do_not_specialize=["first_group"],
    do_not_specialize_on_alignment=["LOGPS", "REF_LOGPS", "layout", "terms", "LOSSES", "SLOPES"],
)
def _group_loss_kernel(
    LOGPS,  # (S,)
    REF_LOGPS,  # (S,) or None
    layout,
    terms,
    LOSSES,  # (E,)
    SLOPES,  # (M,)
    first_group,
    CURVE: tl.constexpr,
    LENGTH_NORMALISED: tl.constexpr,
):
    g = first_group + tl.program_id(0)
    group_loss(g, LOGPS, REF_LOGPS, layout, terms, LOSSES, SLOPES, CURVE, LENGTH_NORMALISED)


def sequence_sums(
    values: Tensor,  # (M,)
    groups: Groups,
    span: Span,
    sums: Tensor,  # (S,) float64, written where the span is
) -> None:
    """Sums over the rows of each of the span's sequences."""
    count = span.sequences.stop - span.sequences.start
    if count:
        _sequence_sums_kernel[(count,)](values, groups.layout.rows, sums, span.sequences.start, num_warps=4)


def group_losses(
    logps: Tensor,  # (S,) float64
    ref_logps: Tensor | None,  # (S,)
    groups: Groups,
    span: Span,
    loss: EdgeLoss,
    scale: float,
    losses: Tensor,  # (E,) written where the span is, without `scale`
    slopes: Tensor,  # (M,) d (scale * sum of losses) / d token log-prob, written where the span is
) -> None:
    """The losses of the span's edges and the slopes of its rows."""
    count = span.groups.stop - span.groups.start
    if count:
        _group_loss_kernel[(count,)](
            logps,
            ref_logps,
            groups.layout,
            edge_terms(loss, scale),
            losses,
            slopes,
            span.groups.start,
            CURVE=loss.curve,
            LENGTH_NORMALISED=loss.length_normalised,
            num_warps=1,
        )
