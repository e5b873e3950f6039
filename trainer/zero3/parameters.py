"""What ZeRO-3 stores on a partitioned parameter: its whole shape and size, and who uses it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

InUse = set[Any]
"""The modules that use a weight at the moment; ZeRO-3 releases the weight when the set is empty."""


def is_partitioned(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def real_shape(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape; while it is partitioned, `parameter.shape` is that of an empty tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


def real_size(parameter: nn.Parameter) -> int:
    """How many numbers the whole parameter has."""
    return getattr(parameter, "ds_numel", parameter.numel())


def own_share(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's elements (k,) of a partitioned parameter; all elements of another one, in its shape.

    Left out is the padding of the last share, which holds whatever was in memory.
    """
    partition: Any = getattr(parameter, "ds_tensor", None)
    if partition is None:
        return parameter.data
    size, weight = partition.numel(), cast(Any, parameter)
    before = dist.get_rank(weight.ds_process_group) * size
    return partition.data.reshape(-1)[: max(0, min(size, weight.ds_numel - before))]


def in_use_sets(parameters: Iterable[nn.Parameter]) -> list[InUse]:
    """ZeRO-3's in-use sets of those parameters that are partitioned."""
    weights: list[Any] = list(parameters)
    return [weight.ds_active_sub_modules for weight in weights if hasattr(weight, "ds_active_sub_modules")]


@contextmanager
def held(sets: list[InUse], user: object) -> Iterator[None]:
    """Keep ZeRO-3 from releasing these weights once they are gathered: `user` will use them next."""
    for in_use in sets:
        in_use.add(user)
    try:
        yield
    finally:
        for in_use in sets:
            in_use.discard(user)
