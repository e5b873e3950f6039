"""The end of a DeepSpeed engine, and copies of weights that it does not renew."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn


def release(engine: Any) -> None:
    """Free the memory of a DeepSpeed engine.

    DeepSpeed's hooks keep engine and module alive after `destroy`, so both are emptied of weights and
    optimiser.
    """
    zero_optimizer = engine.optimizer
    engine.destroy()
    for optimizer in (getattr(zero_optimizer, "optimizer", None), zero_optimizer):
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
    """Drop ZeRO++'s second copies of weights (zero_hpz_partition_size) after a checkpoint is loaded.

    ZeRO++ gathers from them, and loading does not renew them.
    """
    for parameter in module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None  # type: ignore[assignment]
