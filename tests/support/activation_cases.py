"""Models whose activations are computed again or wait in host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from families import VOCAB, tiny_model
from harness import random_groups
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from madpo.trainer.batches.packing import pack
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.attention.prefix_sharing import SegmentTable
from madpo.trainer.model.backbone import last_hidden
from madpo.trainer.model.offload import offload_layers
from madpo.trainer.model.recompute import checkpoint_layers

WAYS: dict[str, dict[str, Any]] = {
    "full": {"gradient_checkpointing": True},
    "selective": {"gradient_checkpointing": "selective"},
    "offloaded": {"activation_offloading": True},
    "full-offloaded": {"gradient_checkpointing": True, "activation_offloading": True},
    "selective-offloaded": {"gradient_checkpointing": "selective", "activation_offloading": True},
}


def prepared(family: str, way: dict[str, Any], **changes: Any) -> Any:
    prefix_sharing.register()
    model = tiny_model(family, prefix_sharing.NAMES["sdpa"], **changes).train()
    if way.get("gradient_checkpointing"):
        checkpoint_layers(model, selective=way["gradient_checkpointing"] == "selective")
    if way.get("activation_offloading"):
        offload_layers(model, min_bytes=0)
    return model


def forward(model: Any, groups: int = 4) -> Callable[[], Tensor]:
    batch = pack(random_groups(groups, vocab=VOCAB))
    return lambda: last_hidden(model, batch, SegmentTable(batch.segments)).square().mean()


def live_bytes(function: Callable[[], Any]) -> int:
    """What the function leaves allocated while its result is alive, as torch's allocator counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    del result
    return sum(event.self_cpu_memory_usage for event in record.events() or [])
