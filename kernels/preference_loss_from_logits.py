"""The preference loss for who has logits already: a pass over them forward, a pass backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from madpo.kernels.checks import require, require_columns, require_edges, require_targets
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.gemm import wide_dtype
from madpo.kernels.layout import Groups
from madpo.kernels.preference_loss import PreferenceLoss
from madpo.kernels.primitives import Impl, Steps, choose_steps, plainly_on
from madpo.kernels.transform import IDENTITY, LogitTransform


def preference_loss_from_logits(
    logits: Tensor,  # (M, V) the positions that predict the targets
    targets: Tensor,  # (M,) in [0, V)
    groups: Groups,
    loss: EdgeLoss,
    *,
    ref_logits: Tensor | None = None,  # (M, V)
    ref_token_logps: Tensor | None = None,  # (M,)
    ref_logps: Tensor | None = None,  # (S,)
    transform: LogitTransform = IDENTITY,
    scale: float = 1.0,
    impl: Impl = "auto",
) -> PreferenceLoss:
    """scale * sum of the edges' losses, with the gradient of the logits.

    The reference is given by at most one of its logits, its log-probs of tokens, or their sums.
    **Backward overwrites the logits with their gradient** and works once. Other objectives are formed
    from `token_logps`.

    Raises ValueError for counts that contradict each other, and where `impl` cannot run.
    """
    groups.check(len(targets))
    require_columns("logits", logits)
    require_targets(targets, logits)
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
    steps = choose_steps(impl, logits)
    args = (targets.contiguous(), groups, loss, reference, transform, scale, steps)
    return PreferenceLoss(*PreferenceLossFromLogitsFunction.apply(logits, *args))  # type: ignore[misc]


class PreferenceLossFromLogitsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        groups: Groups,
        loss: EdgeLoss,
        reference: tuple[Tensor | None, Tensor | None, Tensor | None],
        transform: LogitTransform,
        scale: float,
        steps: Steps,
    ) -> Any:
        ref_logits, ref_token_logps, ref_logps = reference
        wide, device = wide_dtype(logits), logits.device
        logps, normalisers, slopes = torch.empty(3, len(targets), dtype=wide, device=device)
        sums, ref_sums = torch.empty(2, len(groups.lengths), dtype=torch.float64, device=device)
        losses = torch.empty(len(groups.chosen), dtype=wide, device=device)
        if ref_logits is not None:
            ref_token_logps = torch.empty_like(logps)
        if ref_token_logps is not None:
            ref_logps = ref_sums
        with plainly_on(logits):
            steps.score_groups(
                logits,
                ref_logits,
                targets,
                groups,
                loss,
                scale,
                transform,
                logps,
                ref_token_logps,
                normalisers,
                sums,
                ref_logps,
                losses,
                slopes,
            )
        ctx.save_for_backward(logits, targets, normalisers, slopes)
        ctx.transform, ctx.steps = transform, steps
        out = PreferenceLoss(
            (losses.double().sum() * scale).to(wide), logps, ref_token_logps, sums, ref_logps
        )
        ctx.mark_non_differentiable(*(x for x in out[1:] if x is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, normalisers, slopes = ctx.saved_tensors
        slopes = slopes * upstream[0]
        kind = {"transform": ctx.transform, "dtype": logits.dtype}
        with plainly_on(logits):
            d_logits = ctx.steps.dlogits_(logits, targets, normalisers, slopes, **kind, out=logits)
        increment_version(logits)  # so that whoever needs the logits later gets torch's error
        return d_logits, *(None,) * 7
