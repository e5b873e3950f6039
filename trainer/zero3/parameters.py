"""What ZeRO-3 keeps with a parameter that it has partitioned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

InUse = set[Any]
"""ZeRO-3's record of the modules that use a weight just now; it releases the weight when nobody does."""


def is_partitioned(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def real_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter, whose own is that of an empty tensor while it is partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def real_size(parameter: nn.Parameter) -> int:
    """The numbers in the whole parameter."""
    return getattr(parameter, "ds_numel", parameter.numel())


def in_use_sets(parameters: Iterable[nn.Parameter]) -> list[InUse]:
    """The records of use of the parameters that are partitioned."""
    weights: list[Any] = list(parameters)
    return [weight.ds_active_sub_modules for weight in weights if hasattr(weight, "ds_active_sub_modules")]


@contextmanager
def held(records: list[InUse], user: object) -> Iterator[None]:
    """Inside, ZeRO-3 gathers these weights as they are used and keeps them for `user`, which comes after."""
    for record in records:
        record.add(user)
    try:
        yield
    finally:
        for record in records:
            record.discard(user)
