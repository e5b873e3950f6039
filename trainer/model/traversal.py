"""Policy and reference through the layers in one traversal, where the reference is the policy without its
adapter, or with a frozen copy of it.

Every layer runs twice while it is there: the reference's hidden states first, without gradients, then the
policy's. Under ZeRO-3 its weights are gathered once in forward instead of twice; masks and rotary embeddings
are formed once. The reference's rows stay out of the policy's graph: as rows of one batch, their way back
through the frozen base would cost as much as the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from madpo.trainer.model import lora

Context = Callable[[], AbstractContextManager[None]]
Switch = Callable[[nn.Module], Context]
"""A model, or a part of one -> the context in which it is the reference's."""


@dataclass
class Companion:
    """The reference's hidden states, on the way through the policy's backbone."""

    start: Callable[[Tensor], Tensor]  # the policy's input to the first layer -> the reference's
    last: nn.Module  # of the layers
    hidden: Tensor | None = None  # (1, N, H) behind what has run
    past_layers: bool = False

    @property
    def last_hidden(self) -> Tensor:
        """(N, H): after the forward, the reference's as `last_hidden` of the policy."""
        assert self.hidden is not None
        return self.hidden[0]

    def through_layer(
        self, layer: nn.Module, as_reference: Context, forward: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """The policy's output; the hidden states come first among the arguments."""
        if args:
            hidden = self.start(args[0]) if self.hidden is None else self.hidden
            # First: in backward ZeRO-3 lets a module's weights go only if the policy was the last to use it.
            with torch.no_grad(), as_reference(), _held(layer):
                output = forward(hidden, *args[1:], **kwargs)
            self.hidden = output if isinstance(output, Tensor) else output[0]
            self.past_layers = layer is self.last
        return forward(*args, **kwargs)

    def through_module(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The same beside the layers, where only those behind them meet the hidden states."""
        if self.past_layers and args:
            with torch.no_grad():
                self.hidden = forward(self.hidden, *args[1:], **kwargs)
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class Traversal:
    """The parts of a backbone that hidden states go through."""

    layers: list[tuple[nn.Module, Context]]
    beside: list[nn.Module]  # such as the norm behind the layers

    @contextmanager
    def along(self, start: Callable[[Tensor], Tensor] = Tensor.detach) -> Iterator[Companion]:
        """Inside, one forward of the policy's backbone takes the reference's hidden states along.

        Afterwards the backbone is as before: what activation checkpointing computes again in backward is the
        policy's part alone.
        """
        companion = Companion(start, self.layers[-1][0])
        with ExitStack() as replaced:
            for layer, as_reference in self.layers:
                through = partial(companion.through_layer, layer, as_reference, layer.forward)
                replaced.enter_context(_forward_of(layer, through))
            for module in self.beside:
                through = partial(companion.through_module, module.forward)
                replaced.enter_context(_forward_of(module, through))
            yield companion

    @contextmanager
    def starting_from(self, start: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, another input to the first layer; for the comparison with a pass of its own."""

        def replace(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (start(args[0]), *args[1:]) if args else args

        handle = self.layers[0][0].register_forward_pre_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def find_traversal(backbone: nn.Module, switch: Switch) -> Traversal | str:
    """The way through a backbone whose adapter is in its layers, or what stands in it."""
    parents = [
        (parent, child)
        for parent in backbone.modules()
        for child in parent.children()
        if isinstance(child, nn.ModuleList)
        and len(child)
        and all(isinstance(layer, GradientCheckpointingLayer) for layer in child)
    ]
    if len(parents) != 1:
        return f"{type(backbone).__name__} has {len(parents)} stacks of layers"
    ((parent, layers),) = parents
    if len(lora.adapted_layers(layers)) != len(lora.adapted_layers(backbone)):
        return "the adapter has weights outside the layers"
    beside = [child for child in parent.children() if child is not layers]
    return Traversal([(layer, switch(layer)) for layer in layers], beside)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module's hooks go around another forward."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def _held(layer: nn.Module) -> Iterator[None]:
    """Inside, ZeRO-3 gathers weights as they are used and keeps them for the policy, which has no use for the
    frozen copy of an adapter."""
    held: list[Any] = [p for name, p in layer.named_parameters() if f".{lora.REFERENCE}." not in name]
    users: list[set[Any]] = [p.ds_active_sub_modules for p in held if hasattr(p, "ds_active_sub_modules")]
    for those in users:
        those.add(Traversal)
    try:
        yield
    finally:
        for those in users:
            those.discard(Traversal)
