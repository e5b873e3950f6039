"""Checks of the ops' arguments: a kernel would read beyond the end of a tensor that is too short."""

from __future__ import annotations

import torch
from torch import Tensor

from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import GroupLayout


def require(name: str, tensor: Tensor | None, *shape: int, like: Tensor | None = None) -> None:
    """Raise ValueError unless the tensor is None or has this shape, and the dtype and device of `like`."""
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but {shape} is needed")
    if like is not None and (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(
            f"{name}: {tensor.dtype} on {tensor.device}, but {like.dtype} on {like.device} is needed, as of "
            "the hidden states or logits; cast one of them"
        )


def require_columns(name: str, logits: Tensor) -> None:
    """Raise ValueError unless `logits` is (M, V) with columns beside each other."""
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(
            f"{name}: shape {tuple(logits.shape)} with strides {logits.stride()} is not allowed; give "
            "(M, V) with consecutive columns, such as logits.view(-1, V)[rows]"
        )


def require_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    """Raise ValueError unless (M, H), (V, H), (V,) and (M,) belong together."""
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"hidden and weight: shapes {tuple(hidden.shape)} and {tuple(weight.shape)}, but (M, H) and "
            "(V, H) are needed; pack the completion tokens"
        )
    require("weight", weight, len(weight), hidden.shape[1], like=hidden)
    require("bias", bias, len(weight))
    require_targets(targets, hidden)


def require_targets(targets: Tensor, rows: Tensor) -> None:
    require("targets", targets, len(rows))
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: {targets.dtype}, but torch.int64 is needed")


def require_edges(loss: EdgeLoss, groups: GroupLayout) -> None:
    """Raise ValueError unless the loss's vectors have one number per edge."""
    for name in ("offsets", "weights", "margins"):
        require(name, getattr(loss, name), len(groups.chosen))
