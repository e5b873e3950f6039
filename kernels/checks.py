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
    """Raise ValueError unless (M, H), (V, H), (V,) and (M,) belong together, and the weight is whole."""
    _require_whole("weight", weight)
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"hidden and weight: shapes {tuple(hidden.shape)} and {tuple(weight.shape)}, but (M, H) and "
            "(V, H) are needed; pack the completion tokens"
        )
    require("weight", weight, len(weight), hidden.shape[1], like=hidden)
    require("bias", bias, len(weight))
    require_targets(targets, hidden, len(weight))


def _require_whole(name: str, weight: Tensor) -> None:
    """Raise ValueError for a weight of which this rank has a part: FSDP2's and ZeRO-3's look so."""
    advice = (
        "call the loss inside the forward of the module that is wrapped, where the weight is whole; "
        'docs/kernels.md, "Sharded weights", has the ways'
    )
    if hasattr(weight, "full_tensor"):
        raise ValueError(f"{name}: a DTensor, sharded over ranks; {advice}")
    if getattr(weight, "ds_shape", None) is not None and not weight.numel():
        raise ValueError(f"{name}: empty, since ZeRO-3 has shared it out over the ranks; {advice}")


def require_targets(
    targets: Tensor,  # (M,)
    rows: Tensor,  # (M, any) hidden states or logits
    vocabulary: int,
) -> None:
    """Raise ValueError unless there is a target in [0, vocabulary) for every row.

    On a GPU a target out of range fails an assertion on the device, so that the host need not wait for it.
    """
    require("targets", targets, len(rows))
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: {targets.dtype}, but torch.int64 is needed")
    if targets.is_cuda:
        inside = (targets >= 0) & (targets < vocabulary)
        short = f"targets: not all are in [0, {vocabulary}). No label is ignored, not even -100"
        # It takes 254 characters.
        torch.ops.aten._assert_async.msg(inside.all(), f"{short}; see docs/kernels.md")
    elif targets.device.type == "cpu":
        values = targets.numpy()
        for row in ((values < 0) | (values >= vocabulary)).nonzero()[0][:1]:
            raise ValueError(
                f"targets: {values[row]} in row {row} is not in [0, {vocabulary}). {WHAT_TO_PASS}"
            )


WHAT_TO_PASS = (
    "No label is ignored, not even -100: leave such rows out. With labels (B, T) as transformers has them, "
    "scored = labels[:, 1:] != -100; targets = labels[:, 1:][scored]; hidden = states[:, :-1][scored], the "
    "last hidden states of the positions that predict the targets"
)


def require_edges(loss: EdgeLoss, groups: GroupLayout) -> None:
    """Raise ValueError unless the loss's vectors have one number per edge."""
    for name in ("offsets", "weights", "margins"):
        require(name, getattr(loss, name), len(groups.chosen))
