"""Give an engine a checkpoint's weights and optimiser state, whatever number of ranks and stage it is of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import madpo.trainer.zero3.internals  # noqa: F401
from madpo.trainer.errors import CheckpointError
from madpo.trainer.zero3.shards import MASTER, Layout, Shards

MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
"""Where DeepSpeed's optimisers keep their master weights: that of stage 3, of 2 and 1, of 1 in bf16."""


@torch.no_grad()
def restore(engine: Any, stored: Shards) -> None:
    """Fill the engine's own share of weights and optimiser state from the shards; no rank waits for others.

    Raises CheckpointError if other parameters are trained than were.
    """
    sharded = engine.optimizer
    rank, ranks = (ask(sharded.dp_process_group) for ask in (dist.get_rank, dist.get_world_size))
    masters = next(getattr(sharded, name) for name in MASTERS if hasattr(sharded, name))
    shapes = engine._get_zero_param_shapes()
    layout = Layout(shapes, ranks, engine.zero_optimization_stage(), [flat.numel() for flat in masters])
    if layout.sizes != stored.layout.sizes:
        other = sorted(name for name, _ in layout.sizes.items() ^ stored.layout.sizes.items())
        raise CheckpointError(
            f"{stored.folder}: other parameters are trained than were: {', '.join(other[:3])}"
        )
    state = [stored.state_like(next(iter(group)), flat) for group, flat in zip(shapes, masters, strict=True)]
    for flat in masters:  # filled in place, so that there is no second copy of the weights
        flat.data.zero_()
    for name, piece in layout.own(rank):
        kept = {MASTER: masters[piece.group].data, **state[piece.group]}
        for key, flat in kept.items():
            if isinstance(flat, Tensor) and flat.ndim == 1:
                stored.read_into(flat.narrow(0, piece.offset, piece.length), key, name, piece.start)
    _hand_over(engine, masters, dict(enumerate(state)))
    _restore_module(engine.module, stored, rank, ranks)
    engine.global_steps, engine.global_samples = stored.head["global_steps"], stored.head["global_samples"]


def _hand_over(engine: Any, masters: Sequence[Tensor], state: dict[int, Any]) -> None:
    """Give the optimiser its state by DeepSpeed's own loading of a shard, and renew the weights it trains."""
    sharded = engine.optimizer
    if engine.zero_optimization_stage() < 3:
        inner = {"state": state, "param_groups": sharded.optimizer.state_dict()["param_groups"]}
        sharded.optimizer.load_state_dict(inner)
        if hasattr(sharded, "_link_all_hp_params"):
            sharded._link_all_hp_params()
        sharded.update_lp_params()
        return
    sharded._set_fp32_optimizer_param_groups()
    inner = {"state": state, "param_groups": sharded.optimizer.state_dict()["param_groups"]}
    sharded._clear_fp32_optimizer_param_groups()
    sharded._rigid_load_state_dict(
        {
            "loss_scaler": sharded.loss_scaler,
            "dynamic_loss_scale": sharded.dynamic_loss_scale,
            "overflow": False,
            "optimizer_state_dict": inner,
            "fp32_flat_groups": masters,
        }
    )
    if sharded.persistent_parameters:
        sharded.persistent_parameters[0].partition(sharded.persistent_parameters)
    sharded.checkpoint_event_epilogue()


def _restore_module(module: nn.Module, stored: Shards, rank: int, ranks: int) -> None:
    """Fill buffers, and frozen parameters that were saved."""
    for name, buffer in module.named_buffers():
        if name in stored.head["module"]:
            buffer.copy_(stored.head["module"][name])
    for name, parameter in module.named_parameters():
        if name not in stored.frozen or parameter.requires_grad:
            continue
        shard: Any = getattr(parameter, "ds_tensor", None)
        if shard is None:
            stored.read_frozen_into(parameter.data.view(-1), name, 0)
            continue
        size: int = parameter.ds_numel  # type: ignore[attr-defined]
        start = rank * math.ceil(size / ranks)
        length = max(0, min(shard.numel(), size - start))
        stored.read_frozen_into(shard.data.view(-1).narrow(0, 0, length), name, start)
