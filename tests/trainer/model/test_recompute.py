"""What activation checkpointing keeps, and what it computes again."""

from __future__ import annotations

from typing import Any

import torch
from activation_cases import WAYS, forward, live_bytes, prepared
from torch.utils._python_dispatch import TorchDispatchMode


def test_less_is_kept_in_this_order():
    """Between forward and backward, of four layers; and `selective` repeats no product with a weight."""
    kept = {
        name: live_bytes(forward(prepared("Llama 3", way, num_hidden_layers=4), groups=16))
        for name, way in {"none": {}, **WAYS}.items()
        if "offloaded" not in name
    }
    assert kept["full"] < 0.3 * kept["none"]
    assert kept["full"] < kept["selective"] < 0.75 * kept["none"]


def test_selective_repeats_no_product_with_a_weight():
    counts = {}
    for name in ("full", "selective"):
        loss = forward(prepared("Llama 3", WAYS[name]))()
        with Products() as products:
            loss.backward()
        counts[name] = products.count
    layers, linears = 2, 7
    assert counts["selective"] == layers * linears * 2  # the gradients of input and weight
    assert counts["full"] > counts["selective"]


class Products(TorchDispatchMode):
    """Counts the products that are computed; those that were kept do not come this far."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))
