"""A policy's weights for a file: all of them, with an adapter merged in, or the adapter alone.

Each entry's few parameters are gathered for it alone, so that only rank 0 ever holds a whole model. The
weights in training are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from madpo.trainer.dist import Shard
from madpo.trainer.model.lora import POLICY, in_use


class Entry(NamedTuple):
    """One tensor of a file, and the parameters that `value` needs whole."""

    name: str
    parameters: list[nn.Parameter]
    value: Callable[[], Tensor]


def gather(entries: Iterable[Entry], shard: Shard) -> dict[str, Tensor]:
    """The entries' values on rank 0's CPU, an empty dict elsewhere. All ranks must call it."""
    import deepspeed

    out: dict[str, Tensor] = {}
    for entry in entries:
        with torch.no_grad(), deepspeed.zero.GatheredParameters(entry.parameters):
            if shard.is_main:
                out[entry.name] = entry.value().detach().cpu().clone()
    return out


def whole_weights(policy: Any) -> Iterator[Entry]:
    """Parameters and buffers, named as in a model without an adapter; an adapter is merged into them."""
    tied = set(policy.all_tied_weights_keys) if policy.config.tie_word_embeddings else set()
    return (entry for entry in _entries(policy, "") if entry.name not in tied)


def adapter_weights(policy: Any) -> Iterator[Entry]:
    """The trained adapter's parameters, named as in the model."""
    for name, parameter in policy.named_parameters():
        if f".{POLICY}." in name:
            yield Entry(name, [parameter], partial(Tensor.detach, parameter))


def _entries(module: Any, prefix: str) -> Iterator[Entry]:
    module = in_use(module)
    if hasattr(module, "lora_A"):
        base = module.get_base_layer()
        parts = [base.weight, *(p for name, p in module.named_parameters() if f".{POLICY}." in name)]
        yield Entry(f"{prefix}weight", parts, partial(_merged_weight, module))
        if base.bias is not None:
            yield Entry(f"{prefix}bias", [base.bias], partial(Tensor.detach, base.bias))
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield Entry(prefix + name, [parameter], partial(Tensor.detach, parameter))
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield Entry(prefix + name, [], partial(Tensor.detach, buffer))
    for name, child in module.named_children():
        yield from _entries(child, f"{prefix}{name}.")


def _merged_weight(layer: Any) -> Tensor:
    """A layer's weight with its adapter added, in float32; the sum is rounded once."""
    weight = layer.get_base_layer().weight
    if POLICY in layer.lora_variant:  # DoRA
        return layer.lora_variant[POLICY].merge_safe(layer, POLICY, weight.clone())
    return (weight.float() + layer.get_delta_weight(POLICY).float()).to(weight.dtype)
