"""Triton's interpreter, made right for bfloat16.

As of Triton 3.6 it computes on the bits of bfloat16 values and truncates when it narrows to them. Here
narrowing rounds to nearest even, as a GPU does, and arithmetic on values that were not widened first is
an error. Import it before any module that defines kernels.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def install() -> None:
    """Patch the interpreter; a second call changes nothing."""
    builder: Any = InterpreterBuilder
    if getattr(builder, "is_patched", False):
        return
    cast, binary, dot = builder.cast_impl, builder.binary_op, builder.create_dot

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        if source.dtype.scalar == tl.bfloat16 and kind.scalar == tl.float32:
            return TensorHandle(widen(source.data), tl.float32)
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            return TensorHandle(narrow(source.data), tl.bfloat16)
        return cast(self, source, kind)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
            raise TypeError("arithmetic on bfloat16: widen to float32 first")
        return binary(self, left, right, op)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            TensorHandle(widen(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.binary_op, builder.create_dot = cast_impl, binary_op, create_dot
    builder.is_patched = True


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, to nearest even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
