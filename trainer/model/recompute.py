"""Activation checkpointing: what a layer keeps for the backward pass, and what it computes again there."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from madpo.trainer.errors import UserError
from madpo.trainer.zero3.parameters import is_partitioned

KEPT = ("aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::_scaled_dot_product_", "flash_attn::")
"""First parts of the names of operations whose results `selective` keeps: products with weights and fused
attention, nearly all of a layer's arithmetic. Products of activations (aten::bmm) are computed again: in
attention that is written out, they are as large as the square of a sequence."""


def checkpoint_layers(model: PreTrainedModel, selective: bool) -> None:
    """Have every decoder layer keep its input alone, or with `selective` also the results of the operations
    in KEPT. The backward pass computes the rest again, by the same operations and to the same bits.

    Source: Chen et al. 2016 (arXiv 1604.06174); the choice, Korthikanti et al. 2022 (arXiv 2205.05198).
    Raises UserError for a model whose layers cannot be checkpointed.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"model.gradient_checkpointing: {type(model).__name__} has none; set false")
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = _keep_and_reuse
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer.bias is not None and is_partitioned(layer.weight):
                setattr(layer, "forward", partial(_linear_in_two, layer))  # noqa: B010
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _linear_in_two(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """A product and then a sum, as in DeepSpeed's ZeRO-3 linear, but not in place: the product is kept."""
    return nn.functional.linear(hidden, layer.weight) + layer.bias


def _keep_and_reuse() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The contexts of a layer's forward pass and of its repetition."""
    keep, reuse = create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.MUST_SAVE)
    return _OnlyKept(keep), _OnlyKept(reuse)


class _OnlyKept(TorchDispatchMode):
    """Passes the operations in KEPT, and no others, on to torch's context. The context demands the same
    operations in forward and repetition, but ZeRO-3 gathers other weights in the one than in the other."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith(KEPT):
            return self.inner.__torch_dispatch__(func, types, args, kwargs or {})
        return func(*args, **(kwargs or {}))
