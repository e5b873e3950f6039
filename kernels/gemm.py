"""Matrix products of narrow operands with wide sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which logits, sums and gradients are formed: float32, or float64 for float64 inputs."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def mm_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b, summed in a wide dtype and rounded once to out's."""
    if not has_gemm(out, a, b):
        wide = torch.promote_types(wide_dtype(out), wide_dtype(a))
        product = a.to(wide) @ b.to(wide)
        return out.add_(product) if add else out.copy_(product)
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    # The overloads with out_dtype are newer than torch's type stubs.
    kwargs: dict[str, Any] = {"out_dtype": out.dtype, "out": out}
    return torch.addmm(out, a, b, **kwargs) if add else torch.mm(a, b, **kwargs)


def has_gemm(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether torch multiplies these without a cast.

    On a GPU it takes equal dtypes, or narrow ones into float32. On a CPU only wide ones: its bfloat16
    product has no wide output, and reads beyond the last column of a strided operand (seen with torch 2.13).
    """
    if a.dtype != b.dtype:
        return False
    if a.dtype == out.dtype:
        return a.is_cuda or out.dtype == wide_dtype(out)
    return a.is_cuda and a.dtype in NARROW and out.dtype == torch.float32
