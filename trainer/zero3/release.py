"""Memory that DeepSpeed keeps, and copies that it does not renew."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn


def release(engine: Any) -> None:
    """Free what a DeepSpeed engine holds.

    DeepSpeed's hooks keep it and its module alive after `destroy`, so weights and optimiser are taken out
    of them.
    """
    sharded = engine.optimizer
    engine.destroy()
    for optimizer in (getattr(sharded, "optimizer", None), sharded):
        if optimizer is not None:
            vars(optimizer).clear()
    for parameter in engine.module.parameters():
        for partition in ("ds_tensor", "ds_secondary_tensor"):
            if getattr(parameter, partition, None) is not None:
                setattr(parameter, partition, None)
        parameter.data, parameter.grad = parameter.data.new_empty(0), None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_copies(module: nn.Module) -> None:
    """Drop the copies of weights that ZeRO++ gathers from (zero_hpz_partition_size), after a checkpoint is
    loaded: loading does not renew them."""
    for parameter in module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None  # type: ignore[assignment]
