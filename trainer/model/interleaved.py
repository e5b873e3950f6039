"""Policy and reference through the layers in one traversal, where the reference is the policy without its
adapter, or with a frozen copy of it.

Every layer runs twice while it is there: the reference's hidden states first, without gradients, then the
policy's. Under ZeRO-3 its weights are gathered once in forward instead of twice; masks and rotary embeddings
are formed once. The reference's rows stay out of the policy's graph: as rows of one batch, their way back
through the frozen base would cost as much as the policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from madpo.trainer.model import lora
from madpo.trainer.scoring_module import Context, Switch
from madpo.trainer.zero3.parameters import InUse, held, in_use_sets


class Storey(NamedTuple):
    """One layer of the backbone."""

    layer: nn.Module
    as_reference: Context
    users: list[InUse]  # of each weight that the policy uses


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

    def through_layer(self, storey: Storey, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The policy's output; the hidden states come first among the arguments."""
        if args:
            hidden = self.start(args[0]) if self.hidden is None else self.hidden
            # First: in backward ZeRO-3 lets a module's weights go only if the policy was the last to use it.
            with torch.no_grad(), storey.as_reference(), held(storey.users, Traversal):
                output = forward(hidden, *args[1:], **kwargs)
            self.hidden = output if isinstance(output, Tensor) else output[0]
            self.past_layers = storey.layer is self.last
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

    storeys: list[Storey]
    beside: list[nn.Module]  # such as the norm behind the layers

    @contextmanager
    def along(self, start: Callable[[Tensor], Tensor] = Tensor.detach) -> Iterator[Companion]:
        """Inside, one forward of the policy's backbone takes the reference's hidden states along.

        Afterwards the backbone is as before: what activation checkpointing computes again in backward is the
        policy's part alone.
        """
        companion = Companion(start, self.storeys[-1].layer)
        with ExitStack() as replaced:
            for storey in self.storeys:
                through = partial(companion.through_layer, storey, storey.layer.forward)
                replaced.enter_context(_forward_of(storey.layer, through))
            for module in self.beside:
                through = partial(companion.through_module, module.forward)
                replaced.enter_context(_forward_of(module, through))
            yield companion

    @contextmanager
    def starting_from(self, start: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Inside, another input to the first layer; for the comparison with a pass of its own."""

        def replace(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (start(args[0]), *args[1:]) if args else args

        handle = self.storeys[0].layer.register_forward_pre_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def find_traversal(backbone: nn.Module, switch: Switch) -> Traversal | str:
    """The way through a backbone whose adapter is in its layers, or what stands in it.

    To be called when the engine is there: what ZeRO-3 keeps with a weight is looked up once.
    """
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
    return Traversal([Storey(layer, switch(layer), _users(layer)) for layer in layers], beside)


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


def _users(layer: nn.Module) -> list[InUse]:
    """ZeRO-3's records of use of the layer's weights that the policy uses: all but the frozen adapter's."""
    return in_use_sets(p for name, p in layer.named_parameters() if f".{lora.REFERENCE}." not in name)
