"""The preference loss from existing logits: one read of them forward, one read and one write backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from madpo.kernels.checks import require, require_columns, require_edges, require_targets
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.gemm import wide_dtype
from madpo.kernels.layout import GroupLayout
from madpo.kernels.preference_loss import PreferenceLoss
from madpo.kernels.primitives import Impl, Primitives, choose_primitives, device_without_autocast
from madpo.kernels.stats import LogitStats, PairLosses
from madpo.kernels.transform import IDENTITY, LogitTransform


def preference_loss_from_logits(
    logits: Tensor,  # (M, V) the positions that predict the targets
    targets: Tensor,  # (M,) in [0, V)
    groups: GroupLayout,
    loss: EdgeLoss,
    *,
    ref_logits: Tensor | None = None,  # (M, V)
    ref_token_logps: Tensor | None = None,  # (M,)
    ref_logps: Tensor | None = None,  # (S,)
    transform: LogitTransform = IDENTITY,
    scale: float = 1.0,
    impl: Impl = "auto",
) -> PreferenceLoss:
    """scale * sum of the edges' losses, with a gradient to `logits`.

    Give at most one of the reference's logits, its log-probs of tokens, or their sums.
    **Backward overwrites the logits with their gradient** and works once. For objectives that are no
    `EdgeLoss`, take `token_logps`.

    Row i of `logits` is from one position before target i. Raises ValueError for counts that contradict
    each other, for a target outside [0, V) (on a GPU an assertion on the device fails), and where `impl`
    cannot run.
    """
    groups.check(len(targets))
    require_columns("logits", logits)
    require_targets(targets, logits, logits.shape[1])
    require_edges(loss, groups)
    if ref_logits is not None:
        require_columns("ref_logits", ref_logits)
        require("ref_logits", ref_logits, *logits.shape)
    require("ref_token_logps", ref_token_logps, len(targets))
    require("ref_logps", ref_logps, len(groups.lengths))
    given = {"ref_logits": ref_logits, "ref_token_logps": ref_token_logps, "ref_logps": ref_logps}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} were given; give one of them")
    reference = (
        None if ref_logits is None else ref_logits.detach(),
        *(None if x is None else x.detach().contiguous() for x in (ref_token_logps, ref_logps)),
    )
    primitives = choose_primitives(impl, logits)
    args = (targets.contiguous(), groups, loss, reference, transform, scale, primitives)
    return PreferenceLoss(*PreferenceLossFromLogitsFunction.apply(logits, *args))  # type: ignore[misc]


class PreferenceLossFromLogitsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        groups: GroupLayout,
        loss: EdgeLoss,
        reference: tuple[Tensor | None, Tensor | None, Tensor | None],
        transform: LogitTransform,
        scale: float,
        primitives: Primitives,
    ) -> Any:
        ref_logits, ref_token_logps, ref_logps = reference
        wide, device = wide_dtype(logits), logits.device
        token_logps, normalisers, dloss_dlogps = torch.empty(3, len(targets), dtype=wide, device=device)
        logps, ref_sums = torch.empty(2, len(groups.lengths), dtype=torch.float64, device=device)
        losses = torch.empty(len(groups.chosen), dtype=wide, device=device)
        if ref_logits is not None:
            ref_token_logps = torch.empty_like(token_logps)
        if ref_token_logps is not None:
            ref_logps = ref_sums
        stats = LogitStats(token_logps, ref_token_logps, normalisers)
        pairs = PairLosses(logps, ref_logps, losses, dloss_dlogps)
        with device_without_autocast(logits):
            primitives.score_groups(logits, ref_logits, targets, groups, loss, scale, transform, stats, pairs)
        ctx.save_for_backward(logits, targets, normalisers, dloss_dlogps)
        ctx.transform, ctx.primitives = transform, primitives
        total = (losses.double().sum() * scale).to(wide)
        out = PreferenceLoss(total, token_logps, ref_token_logps, logps, ref_logps)
        ctx.mark_non_differentiable(*(x for x in out[1:] if x is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, normalisers, dloss_dlogps = ctx.saved_tensors
        dloss_dlogps = dloss_dlogps * upstream[0]
        options = {"transform": ctx.transform, "dtype": logits.dtype, "out": logits}
        with device_without_autocast(logits):
            d_logits = ctx.primitives.dlogits_(logits, targets, normalisers, dloss_dlogps, **options)
        increment_version(logits)  # torch then raises its error for anyone who needs the logits later
        return d_logits, *(None,) * 7
