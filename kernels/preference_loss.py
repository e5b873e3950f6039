"""The preference head: hidden states and output weight -> loss and gradients, without keeping all logits.

It works in chunks of whole groups. A chunk's logits give the log-probs of its targets, these the losses of
its edges and the gradient in each log-prob, and with that gradient the logits are turned into their own
gradient in place. The gradients of hidden states and weight follow from it. All this happens in forward,
in 8 M H V operations with a reference, and nothing is computed twice. Only a group whose logits exceed the
budget is walked twice, a block of the vocabulary at a time. docs/kernels.md has the derivation and the
memory formula.
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
from madpo.kernels.chunks import Chunk, padded, plan_chunks
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.gemm import mm_into, wide_dtype
from madpo.kernels.layout import GroupLayout, GroupRange
from madpo.kernels.primitives import Impl, Primitives, choose_primitives, device_without_autocast
from madpo.kernels.stats import LogitStats, PairLosses
from madpo.kernels.transform import IDENTITY, LogitTransform

LogpsLoss = Callable[[Tensor, Tensor | None, GroupRange], Tensor]
"""(token_logps (m,), ref_token_logps (m,) or None, their groups) -> () the sum of these groups' losses."""


class PreferenceLoss(NamedTuple):
    """Only `loss` carries a gradient."""

    loss: Tensor  # () scale * sum of the losses
    token_logps: Tensor  # (M,)
    ref_token_logps: Tensor | None  # (M,)
    logps: Tensor  # (S,) float64, sums over the tokens of each sequence
    ref_logps: Tensor | None  # (S,)


@dataclass(frozen=True)
class Reference:
    """The reference: its hidden states and weight, or log-probs that were scored before, or nothing."""

    hidden: Tensor | None = None  # (M, H)
    weight: Tensor | None = None  # (V, H)
    bias: Tensor | None = None  # (V,)
    token_logps: Tensor | None = None  # (M,)
    logps: Tensor | None = None  # (S,)


def preference_loss(
    hidden: Tensor,  # (M, H) the positions that predict the targets
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (M,) in [0, V)
    groups: GroupLayout,
    loss: EdgeLoss | LogpsLoss,
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

    Row i of `hidden` is the last hidden state one position before target i: the state that predicts it.
    Only scored rows are given; no label is ignored. `weight` is the output layer's, whole, not a rank's part
    of it. docs/kernels.md shows how to get both from a model, and the ways with sharded weights.

    The kernels form an `EdgeLoss`. Any other loss is a function of log-probs, which is called for each
    chunk and differentiated by autograd on these small vectors. The logits in memory at once take at most
    `budget_bytes` (see `plan_chunks`), in float32 unless `logits_dtype` says otherwise. Gradients are
    formed in forward and kept until backward, which works once.

    Raises ValueError for shapes, dtypes and counts that contradict each other, for a target outside
    [0, V) (on a GPU an assertion on the device fails), for a sharded weight, and where `impl` cannot run.
    An edge must compare two sequences of its own group; that is not checked.
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
        choose_primitives(impl, hidden),
    )
    if hidden.dtype == torch.float16 and any(args.needs):
        raise ValueError(
            "hidden: float16 gradients are formed in forward, before a loss scale could keep them from "
            "vanishing; use bfloat16 or float32"
        )
    forward = partial(preference_loss_fwd, args=args)
    return PreferenceLoss(*PreferenceLossFunction.apply(hidden, weight, bias, forward, args.primitives))  # type: ignore[misc]


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    groups: GroupLayout,
    loss: EdgeLoss | LogpsLoss,
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
    groups: GroupLayout
    loss: EdgeLoss | LogpsLoss
    reference: Reference
    transform: LogitTransform
    scale: float
    budget_bytes: int
    logits_dtype: torch.dtype | None
    primitives: Primitives


class PreferenceLossFunction(torch.autograd.Function):
    """Calls `forward` for (outputs with the loss first, gradients); backward returns these gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        forward: Callable[..., Any],
        primitives: Primitives,
    ) -> Any:
        with device_without_autocast(hidden):
            result, ctx.gradients = forward(hidden, weight, bias)
        ctx.primitives = primitives
        ctx.mark_non_differentiable(*(x for x in result[1:] if x is not None))
        ctx.set_materialize_grads(False)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("preference_loss: backward works once; call the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        with device_without_autocast(upstream[0]):
            scaled = (None if g is None else ctx.primitives.scale_(g, upstream[0]) for g in gradients)
            return *scaled, None, None


def preference_loss_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, args: HeadArgs
) -> tuple[PreferenceLoss, Sequence[Tensor | None]]:
    """The outputs, and the gradients of hidden states, weight and bias, None where not needed."""
    head = _Head(args, hidden, weight, bias)
    for chunk in head.chunks:
        head.score(chunk)
        head.form_loss(chunk.group_range)
        if any(args.needs):
            head.form_gradients(chunk)
    del head.logits_memory
    return head.result(), head.gradients()


class _Head:
    """The state of one forward pass: log-probs, losses and gradients, filled chunk by chunk."""

    def __init__(self, args: HeadArgs, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.args, self.primitives, self.groups, self.bias = args, args.primitives, args.groups, bias
        self.wide, self.dtypes = wide_dtype(hidden), (hidden.dtype, weight.dtype)
        self.hidden, self.weight, self.reference = hidden, weight, args.reference
        if self.primitives.name == "torch":
            self._widen()
        narrow = args.logits_dtype or self.hidden.dtype
        self.chunks = plan_chunks(
            self.groups, len(weight), args.budget_bytes, args.logits_dtype or self.wide, narrow
        )
        self._allocate(hidden.device)

    def _widen(self) -> None:
        """Cast the operands once: plain torch has no GEMM with wide sums of narrow ones on every device."""
        self.hidden, self.weight = self.hidden.to(self.wide), self.weight.to(self.wide)
        ref = self.reference
        if ref.hidden is not None and ref.weight is not None:
            self.reference = replace(ref, hidden=ref.hidden.to(self.wide), weight=ref.weight.to(self.wide))

    def _allocate(self, device: torch.device) -> None:
        rows, sequences = len(self.args.targets), len(self.groups.lengths)
        token_logps, normalisers, dloss_dlogps = torch.empty(3, rows, dtype=self.wide, device=device)
        logps, ref_sums = torch.empty(2, sequences, dtype=torch.float64, device=device)
        losses = torch.empty(len(self.groups.chosen), dtype=self.wide, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        ref_token_logps = self.reference.token_logps
        if self.reference.hidden is not None:
            ref_token_logps = torch.empty_like(token_logps)
        ref_logps = ref_sums if ref_token_logps is not None else self.reference.logps
        self.stats = LogitStats(token_logps, ref_token_logps, normalisers)
        self.pairs = PairLosses(logps, ref_logps, losses, dloss_dlogps)

        sizes = (
            _num_bytes(chunk.group_range.num_rows, chunk.columns, chunk.logits_dtype) for chunk in self.chunks
        )
        self.logits_memory = torch.empty(max(sizes, default=0), dtype=torch.uint8, device=device)

        need_hidden, need_weight, need_bias = self.args.needs
        # The weight's gradient is summed over chunks in a wide dtype; a single chunk writes it at once.
        sum_dtype = self.dtypes[1] if len(self.chunks) == 1 else self.wide
        hidden_like, weight_like = self.hidden.shape, self.weight.shape
        self.d_hidden = torch.empty(hidden_like, dtype=self.dtypes[0], device=device) if need_hidden else None
        self.d_weight = torch.empty(weight_like, dtype=sum_dtype, device=device) if need_weight else None
        self.d_bias = torch.zeros(len(self.weight), dtype=self.wide, device=device) if need_bias else None
        if not self.chunks and self.d_weight is not None:
            self.d_weight.zero_()

    def score(self, chunk: Chunk) -> None:
        """Score the chunk's targets. The policy comes last: its logits stay in memory."""
        ref = self.reference
        if ref.hidden is not None and ref.weight is not None:
            self._score(chunk, ref.hidden, ref.weight, ref.bias, self.stats.ref_token_logps, None)
        stats = self.stats
        self._score(chunk, self.hidden, self.weight, self.bias, stats.token_logps, stats.normalisers)

    def _score(
        self,
        chunk: Chunk,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logps: Tensor | None,
        normalisers: Tensor | None,
    ) -> None:
        rows, state = chunk.group_range.rows, None
        assert logps is not None
        if chunk.columns < len(weight):
            state = torch.empty(3, chunk.group_range.num_rows, dtype=self.wide, device=hidden.device)
        for columns in self._vocab_blocks(chunk):
            self.primitives.row_stats(
                mm_into(self._logits(chunk, columns), hidden[rows], weight[columns].T),
                self.args.targets[rows],
                logps[rows],
                None if normalisers is None else normalisers[rows],
                bias=bias,
                transform=self.args.transform,
                state=state,
                first_column=columns.start,
                last=columns.stop == len(weight),
            )

    def _vocab_blocks(self, chunk: Chunk) -> Iterator[slice]:
        for first in range(0, len(self.weight), chunk.columns):
            yield slice(first, min(first + chunk.columns, len(self.weight)))

    def _logits(self, chunk: Chunk, columns: slice) -> Tensor:
        """(m, C) the memory of the chunk's logits, with whatever was left there."""
        rows, width = chunk.group_range.num_rows, columns.stop - columns.start
        memory = self.logits_memory[: _num_bytes(rows, width, chunk.logits_dtype)]
        return memory.view(chunk.logits_dtype).view(rows, padded(width))[:, :width]

    def form_loss(self, group_range: GroupRange) -> None:
        """Form the losses of these groups, and the gradient in the log-prob of each token."""
        stats, pairs, rows = self.stats, self.pairs, group_range.rows
        self.primitives.sequence_sums(stats.token_logps, self.groups, group_range, pairs.logps)
        if stats.ref_token_logps is not None:
            assert pairs.ref_logps is not None
            self.primitives.sequence_sums(stats.ref_token_logps, self.groups, group_range, pairs.ref_logps)
        loss, scale = self.args.loss, self.args.scale
        if isinstance(loss, EdgeLoss):
            self.primitives.group_losses(pairs, self.groups, group_range, loss, scale)
            return
        with torch.enable_grad():
            leaf = stats.token_logps[rows].clone().requires_grad_()
            ref = None if stats.ref_token_logps is None else stats.ref_token_logps[rows]
            chunk_loss = loss(leaf, ref, group_range) * scale
            if not chunk_loss.requires_grad:
                pairs.dloss_dlogps[rows] = 0.0
            elif any(self.args.needs):
                (pairs.dloss_dlogps[rows],) = torch.autograd.grad(chunk_loss, leaf)
        self.total += chunk_loss.detach()

    def form_gradients(self, chunk: Chunk) -> None:
        """Add the chunk's part to the gradients; overwrites its logits."""
        rows, whole, is_first = (
            chunk.group_range.rows,
            chunk.columns == len(self.weight),
            chunk is self.chunks[0],
        )
        d_hidden = None
        if self.d_hidden is not None:
            # Wide even for one block: with few rows cuBLAS splits the sum over the vocabulary, and with a
            # narrow output it would round the parts.
            shape = chunk.group_range.num_rows, self.hidden.shape[1]
            d_hidden = torch.empty(shape, dtype=self.wide, device=self.hidden.device)
        for columns in self._vocab_blocks(chunk):
            logits = self._logits(chunk, columns)
            if not whole:
                mm_into(logits, self.hidden[rows], self.weight[columns].T)
            d_logits = self.primitives.dlogits_(
                logits,
                self.args.targets[rows],
                self.stats.normalisers[rows],
                self.pairs.dloss_dlogps[rows],
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
            self.total = self.pairs.losses.double().sum() * self.args.scale
        stats, pairs = self.stats, self.pairs
        return PreferenceLoss(
            self.total.to(self.wide), stats.token_logps, stats.ref_token_logps, pairs.logps, pairs.ref_logps
        )

    def gradients(self) -> Sequence[Tensor | None]:
        return (
            self.d_hidden,
            None if self.d_weight is None else self.d_weight.to(self.dtypes[1]),
            None if self.d_bias is None or self.bias is None else self.d_bias.to(self.bias.dtype),
        )


def _num_bytes(rows: int, columns: int, dtype: torch.dtype) -> int:
    return rows * padded(columns) * dtype.itemsize
