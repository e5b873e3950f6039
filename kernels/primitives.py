"""The primitives that every op is made of, and the one place that chooses between Triton and plain torch.

The contract is the same in both and described where the Triton version is: `row_stats`, `dlogits_` and
`scale_` in logit_rows.py, `sequence_sums` and `group_losses` in group_loss.py, `score_groups` in
fused_from_logits.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from madpo.kernels.gemm import NARROW
from madpo.kernels.layout import Groups, Span
from madpo.kernels.torch_primitives import (
    dlogits_ref_,
    group_losses_ref,
    row_stats_ref,
    scale_ref_,
    score_groups_ref,
    sequence_sums_ref,
)

Impl = Literal["auto", "triton", "torch"]
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


TORCH = Steps(
    "torch", row_stats_ref, dlogits_ref_, sequence_sums_ref, group_losses_ref, score_groups_ref, scale_ref_
)
