"""The preference head: hidden states and output weights -> loss and gradients, logits never kept whole.

Work goes in waves of whole groups. A wave's logits give the log-probs of its targets, these the losses
of its edges and one slope per row, and with the slopes the same logits become their own gradient, from
which those of hidden states and weight follow: all in forward, 8 M H V operations with a reference,
nothing computed twice. Only a group that is too large for the budget is walked a slab of the vocabulary
at a time, twice. docs/kernels.md has the derivation and the memory formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from madpo.kernels.checks import require, require_edges, require_head
from madpo.kernels.chunks import Wave, padded, plan_waves
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.gemm import mm_into, wide_dtype
from madpo.kernels.layout import Groups, Span
from madpo.kernels.primitives import Impl, Steps, choose_steps, plainly_on
from madpo.kernels.transform import IDENTITY, LogitTransform

SpanLoss = Callable[[Tensor, Tensor | None, Span], Tensor]
"""(token_logps (m,), ref_token_logps (m,) or None, span) -> sum of the span's losses, a scalar."""


class PreferenceLoss(NamedTuple):
    """Only `loss` carries a gradient."""

    loss: Tensor  # () scale * sum of the losses
    token_logps: Tensor  # (M,)
    ref_token_logps: Tensor | None  # (M,)
    logps: Tensor  # (S,) float64, sums over the tokens of each sequence
    ref_logps: Tensor | None  # (S,)


@dataclass(frozen=True)
class Reference:
    """What is known of the reference: its hidden states and weight, or log-probs scored before."""

    hidden: Tensor | None = None  # (M, H)
    weight: Tensor | None = None  # (V, H)
    bias: Tensor | None = None  # (V,)
    token_logps: Tensor | None = None  # (M,)
    logps: Tensor | None = None  # (S,)


def preference_loss(
    hidden: Tensor,  # (M, H) the positions that predict the targets
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (M,) in [0, V)
    groups: Groups,
    loss: EdgeLoss | SpanLoss,
    reference: Reference | None = None,
    *,
    bias: Tensor | None = None,  # (V,)
    transform: LogitTransform = IDENTITY,
    scale: float = 1.0,
    budget_bytes: int = 2**31,
    logits_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> PreferenceLoss:
    """scale * sum of the losses, with gradients to `hidden`, `weight` and `bias`.

    An `EdgeLoss` is formed in the kernels; any other objective is a function of a span's log-probs,
    differentiated by autograd on those small vectors. The logits in memory at once take at most
    `budget_bytes` (see `plan_waves`), in float32 unless `logits_dtype` says otherwise. Gradients are
    formed in forward and kept until backward, which works once.

    Raises ValueError for shapes, dtypes and counts that contradict each other, and where `impl` cannot
    run. An edge must compare two sequences of its own group; that is not checked.
    """
    reference = reference or Reference()
    _check(hidden, weight, bias, targets, groups, loss, reference, logits_dtype)
    training = torch.is_grad_enabled()  # an autograd Function cannot tell: it runs without gradients
    args = HeadArgs(
        tuple(training and x is not None and x.requires_grad for x in (hidden, weight, bias)),
        targets.contiguous(),
        groups,
        loss,
        _detached(reference),
        transform,
        scale,
        budget_bytes,
        logits_dtype,
        choose_steps(impl, hidden),
    )
    if hidden.dtype == torch.float16 and any(args.needs):
        raise ValueError(
            "hidden: float16 gradients are formed in forward, before a loss scale could keep them from "
            "vanishing; use bfloat16 or float32"
        )
    forward = partial(preference_loss_fwd, args=args)
    return PreferenceLoss(*PreferenceLossFunction.apply(hidden, weight, bias, forward, args.steps))  # type: ignore[misc]


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: Groups,
    loss: EdgeLoss | SpanLoss,
    reference: Reference,
    logits_dtype: torch.dtype | None,
) -> None:
    require_head(hidden, weight, bias, targets)
    groups.check(len(targets))
    if isinstance(loss, EdgeLoss):
        require_edges(loss, groups)
    if logits_dtype not in (None, hidden.dtype, wide_dtype(hidden)):
        raise ValueError(
            f"logits_dtype: {logits_dtype}, but {hidden.dtype} or {wide_dtype(hidden)} is needed"
        )
    require("reference.hidden", reference.hidden, *hidden.shape, like=hidden)
    require("reference.weight", reference.weight, *weight.shape, like=hidden)
    require("reference.bias", reference.bias, len(weight))
    require("reference.token_logps", reference.token_logps, len(targets))
    require("reference.logps", reference.logps, len(groups.lengths))
    given = [name for name in ("hidden", "token_logps", "logps") if getattr(reference, name) is not None]
    if len(given) > 1:
        raise ValueError(f"reference: {' and '.join(given)} were given; give one of them")
    if (reference.hidden is None) != (reference.weight is None):
        raise ValueError("reference: hidden and weight come together; give both or neither")
    if reference.logps is not None and not isinstance(loss, EdgeLoss):
        raise ValueError("reference: logps are for an EdgeLoss; give token_logps, or close over them")


def _detached(reference: Reference) -> Reference:
    hidden, weight, *vectors = vars(reference).values()
    return Reference(
        None if hidden is None else hidden.detach(),
        None if weight is None else weight.detach(),
        *(None if vector is None else vector.detach().contiguous() for vector in vectors),
    )


@dataclass(frozen=True)
class HeadArgs:
    """Everything that is not differentiated."""

    needs: tuple[bool, ...]  # gradients of hidden, weight, bias
    targets: Tensor
    groups: Groups
    loss: EdgeLoss | SpanLoss
    reference: Reference
    transform: LogitTransform
    scale: float
    budget_bytes: int
    logits_dtype: torch.dtype | None
    steps: Steps


class PreferenceLossFunction(torch.autograd.Function):
    """`forward` gives (loss and what else is known, gradients); backward hands the gradients out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        forward: Callable[..., Any],
        steps: Steps,
    ) -> Any:
        with plainly_on(hidden):
            result, ctx.gradients = forward(hidden, weight, bias)
        ctx.steps = steps
        ctx.mark_non_differentiable(*(x for x in result[1:] if x is not None))
        ctx.set_materialize_grads(False)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("preference_loss: backward works once; call the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        with plainly_on(upstream[0]):
            return *(None if g is None else ctx.steps.scale_(g, upstream[0]) for g in gradients), None, None


def preference_loss_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, args: HeadArgs
) -> tuple[PreferenceLoss, Sequence[Tensor | None]]:
    """The loss, and the gradients of hidden states, weight and bias where they are needed."""
    head = _Head(args, hidden, weight, bias)
    for wave in head.waves:
        head.score(wave)
        head.form_loss(wave.span)
        if any(args.needs):
            head.form_gradients(wave)
    del head.logits_memory
    return head.result(), head.gradients()


class _Head:
    """One forward: what is known of every row so far, and the gradients so far."""

    def __init__(self, args: HeadArgs, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.args, self.steps, self.groups, self.bias = args, args.steps, args.groups, bias
        self.wide, self.dtypes = wide_dtype(hidden), (hidden.dtype, weight.dtype)
        self.hidden, self.weight, self.reference = hidden, weight, args.reference
        if self.steps.name == "torch":
            self._widen()
        narrow = args.logits_dtype or self.hidden.dtype
        self.waves = plan_waves(
            self.groups, len(weight), args.budget_bytes, args.logits_dtype or self.wide, narrow
        )
        self._allocate(hidden.device)

    def _widen(self) -> None:
        """Plain torch has no GEMM from narrow operands to wide sums on every device: widen once."""
        self.hidden, self.weight = self.hidden.to(self.wide), self.weight.to(self.wide)
        ref = self.reference
        if ref.hidden is not None and ref.weight is not None:
            self.reference = replace(ref, hidden=ref.hidden.to(self.wide), weight=ref.weight.to(self.wide))

    def _allocate(self, device: torch.device) -> None:
        rows, sequences = len(self.args.targets), len(self.groups.lengths)
        self.logps, self.normalisers, self.slopes = torch.empty(3, rows, dtype=self.wide, device=device)
        self.logp_sums, self.ref_sums = torch.empty(2, sequences, dtype=torch.float64, device=device)
        self.losses = torch.empty(len(self.groups.chosen), dtype=self.wide, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.ref_token_logps = self.reference.token_logps
        if self.reference.hidden is not None:
            self.ref_token_logps = torch.empty_like(self.logps)
        self.ref_logps = self.ref_sums if self.ref_token_logps is not None else self.reference.logps

        sizes = (_num_bytes(wave.span.num_rows, wave.columns, wave.logits_dtype) for wave in self.waves)
        self.logits_memory = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=device)

        need_hidden, need_weight, need_bias = self.args.needs
        # The weight's gradient is summed over waves in a wide type; a single wave writes it at once.
        sum_dtype = self.dtypes[1] if len(self.waves) == 1 else self.wide
        hidden_like, weight_like = self.hidden.shape, self.weight.shape
        self.d_hidden = torch.empty(hidden_like, dtype=self.dtypes[0], device=device) if need_hidden else None
        self.d_weight = torch.empty(weight_like, dtype=sum_dtype, device=device) if need_weight else None
        self.d_bias = torch.zeros(len(self.weight), dtype=self.wide, device=device) if need_bias else None
        if not self.waves and self.d_weight is not None:
            self.d_weight.zero_()

    def score(self, wave: Wave) -> None:
        """Log-probs of the wave's rows. The policy comes last: its logits stay in memory."""
        ref = self.reference
        if ref.hidden is not None and ref.weight is not None:
            self._score(wave, ref.hidden, ref.weight, ref.bias, self.ref_token_logps, None)
        self._score(wave, self.hidden, self.weight, self.bias, self.logps, self.normalisers)

    def _score(
        self,
        wave: Wave,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logps: Tensor | None,
        normalisers: Tensor | None,
    ) -> None:
        rows, state = wave.span.rows, None
        assert logps is not None
        if wave.columns < len(weight):
            state = torch.empty(3, wave.span.num_rows, dtype=self.wide, device=hidden.device)
        for columns in self._slabs(wave):
            self.steps.row_stats(
                mm_into(self._logits(wave, columns), hidden[rows], weight[columns].T),
                self.args.targets[rows],
                logps[rows],
                None if normalisers is None else normalisers[rows],
                bias=bias,
                transform=self.args.transform,
                state=state,
                first_column=columns.start,
                last=columns.stop == len(weight),
            )

    def _slabs(self, wave: Wave) -> Iterator[slice]:
        for first in range(0, len(self.weight), wave.columns):
            yield slice(first, min(first + wave.columns, len(self.weight)))

    def _logits(self, wave: Wave, columns: slice) -> Tensor:
        """(m, C) where the logits of a wave live, as they were left."""
        rows, width = wave.span.num_rows, columns.stop - columns.start
        memory = self.logits_memory[: _num_bytes(rows, width, wave.logits_dtype)]
        return memory.view(wave.logits_dtype).view(rows, padded(width))[:, :width]

    def form_loss(self, span: Span) -> None:
        """The span's losses and the slopes of its rows."""
        self.steps.sequence_sums(self.logps, self.groups, span, self.logp_sums)
        if self.ref_token_logps is not None:
            self.steps.sequence_sums(self.ref_token_logps, self.groups, span, self.ref_sums)
        loss, scale = self.args.loss, self.args.scale
        if isinstance(loss, EdgeLoss):
            sums = self.logp_sums, self.ref_logps
            self.steps.group_losses(*sums, self.groups, span, loss, scale, self.losses, self.slopes)
            return
        with torch.enable_grad():
            leaf = self.logps[span.rows].clone().requires_grad_()
            ref = None if self.ref_token_logps is None else self.ref_token_logps[span.rows]
            span_loss = loss(leaf, ref, span) * scale
            if not span_loss.requires_grad:
                self.slopes[span.rows] = 0.0
            elif any(self.args.needs):
                (self.slopes[span.rows],) = torch.autograd.grad(span_loss, leaf)
        self.total += span_loss.detach()

    def form_gradients(self, wave: Wave) -> None:
        """Add the wave's share to the gradients; uses up its logits."""
        rows, whole, is_first = wave.span.rows, wave.columns == len(self.weight), wave is self.waves[0]
        d_hidden = None
        if self.d_hidden is not None:
            # Wide even for one slab: with few rows cuBLAS splits the sum over the vocabulary, and into a
            # narrow output it would round the parts.
            shape = wave.span.num_rows, self.hidden.shape[1]
            d_hidden = torch.empty(shape, dtype=self.wide, device=self.hidden.device)
        for columns in self._slabs(wave):
            logits = self._logits(wave, columns)
            if not whole:
                mm_into(logits, self.hidden[rows], self.weight[columns].T)
            d_logits = self.steps.dlogits_(
                logits,
                self.args.targets[rows],
                self.normalisers[rows],
                self.slopes[rows],
                bias=self.bias,
                transform=self.args.transform,
                dtype=self.hidden.dtype,
                first_column=columns.start,
            )
            if d_hidden is not None:
                mm_into(d_hidden, d_logits, self.weight[columns], add=columns.start > 0)
            if self.d_weight is not None:
                mm_into(self.d_weight[columns], d_logits.T, self.hidden[rows], add=not is_first)
            if self.d_bias is not None:
                self.d_bias[columns] += d_logits.sum(0, dtype=self.wide)
        if d_hidden is not None and self.d_hidden is not None:
            self.d_hidden[rows] = d_hidden

    def result(self) -> PreferenceLoss:
        if isinstance(self.args.loss, EdgeLoss):
            self.total = self.losses.double().sum() * self.args.scale
        loss = self.total.to(self.wide)
        return PreferenceLoss(loss, self.logps, self.ref_token_logps, self.logp_sums, self.ref_logps)

    def gradients(self) -> Sequence[Tensor | None]:
        return (
            self.d_hidden,
            None if self.d_weight is None else self.d_weight.to(self.dtypes[1]),
            None if self.d_bias is None or self.bias is None else self.d_bias.to(self.bias.dtype),
        )


def _num_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return rows * padded(columns) * dtype.itemsize
