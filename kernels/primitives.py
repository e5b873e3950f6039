"""The primitives that every op is made of, and the one place that chooses between Triton and plain torch.

Each primitive has a Triton version and a twin in plain torch (torch_primitives.py) with the same
arguments. They are documented at the Triton version: `row_stats`, `dlogits_` and `scale_` in
logit_rows.py, `sequence_sums` and `group_losses` in group_loss.py, `score_groups` in fused_from_logits.py.
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
from madpo.kernels.layout import GroupLayout, GroupRange
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
class Primitives:
    """One implementation of the primitives."""

    name: str
    row_stats: Callable[..., None]
    dlogits_: Callable[..., Tensor]
    sequence_sums: Callable[[Tensor, GroupLayout, GroupRange, Tensor], None]
    group_losses: Callable[..., None]
    score_groups: Callable[..., None]
    scale_: Callable[[Tensor, Tensor], Tensor]


def choose_primitives(impl: Impl, tensor: Tensor) -> Primitives:
    """The implementation for `tensor`. Raises ValueError where Triton is asked for and cannot run."""
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

    return Primitives(
        "triton",
        logit_rows.row_stats,
        logit_rows.dlogits_,
        group_loss.sequence_sums,
        group_loss.group_losses,
        fused_from_logits.score_groups,
        logit_rows.scale_,
    )


@contextmanager
def device_without_autocast(tensor: Tensor) -> Iterator[None]:
    """Make the tensor's device current and turn autocast off, inside the context.

    Triton launches on the current device. Autocast would downcast sums that are wide on purpose.
    """
    kind = tensor.device.type
    autocast = torch.autocast(kind, enabled=False) if kind in ("cuda", "cpu") else nullcontext()
    with torch.cuda.device_of(tensor), autocast:
        yield


TORCH = Primitives(
    "torch", row_stats_ref, dlogits_ref_, sequence_sums_ref, group_losses_ref, score_groups_ref, scale_ref_
)
