"""The interleaved forward: policy and reference go through the layers in one forward pass.

It is for a reference that is the policy without its adapter, or with a frozen copy of the adapter. Each
layer runs twice before the next one: on the reference's hidden states without gradients, then on the
policy's. Under ZeRO-3 a layer's weights are gathered once in forward instead of twice; masks and rotary
embeddings are formed once. The reference is not put into the policy's batch: its rows would then go back
through the frozen base too, at the price of the policy's.
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


class LayerPair(NamedTuple):
    """One layer of the backbone, the policy's and the reference's."""

    layer: nn.Module
    as_reference: Context
    in_use: list[InUse]  # of each weight that the policy uses


@dataclass
class ReferenceStream:
    """The reference's hidden states on their way through the policy's backbone."""

    start: Callable[[Tensor], Tensor]  # the policy's input to the first layer -> the reference's
    last_layer: nn.Module
    hidden: Tensor | None = None  # (1, N, H) after the modules that have run
    past_layers: bool = False

    @property
    def last_hidden(self) -> Tensor:
        """(N, H): the reference's last hidden states, after the forward."""
        assert self.hidden is not None
        return self.hidden[0]

    def through_layer(self, pair: LayerPair, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a layer for the reference, then for the policy, whose output it returns. Hidden states are the
        first argument."""
        if args:
            hidden = self.start(args[0]) if self.hidden is None else self.hidden
            # Reference first: in backward ZeRO-3 releases a layer's weights only if the policy used it last.
            with torch.no_grad(), pair.as_reference(), held(pair.in_use, InterleavedForward):
                output = forward(hidden, *args[1:], **kwargs)
            self.hidden = output if isinstance(output, Tensor) else output[0]
            self.past_layers = pair.layer is self.last_layer
        return forward(*args, **kwargs)

    def through_module(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a module that is no layer. Those after the last layer (the final norm) process the reference's
        hidden states too; embeddings and the like, before the layers, do not."""
        if self.past_layers and args:
            with torch.no_grad():
                self.hidden = forward(self.hidden, *args[1:], **kwargs)
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class InterleavedForward:
    """A backbone whose forward can compute the reference beside the policy."""

    layers: list[LayerPair]
    other_modules: list[nn.Module]  # beside the layers: embeddings, the final norm

    @contextmanager
    def reference_beside(
        self, start: Callable[[Tensor], Tensor] = Tensor.detach
    ) -> Iterator[ReferenceStream]:
        """Have one forward of the policy's backbone compute the reference's hidden states too, while inside.

        Afterwards the backbone is as before, so that activation checkpointing computes only the policy's part
        again in backward.
        """
        stream = ReferenceStream(start, self.layers[-1].layer)
        with ExitStack() as replaced:
            for pair in self.layers:
                through = partial(stream.through_layer, pair, pair.layer.forward)
                replaced.enter_context(_forward_replaced(pair.layer, through))
            for module in self.other_modules:
                through = partial(stream.through_module, module.forward)
                replaced.enter_context(_forward_replaced(module, through))
            yield stream

    @contextmanager
    def starting_from(self, start: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Give the first layer `start` of its input, while inside: what a separate pass is compared with."""

        def replace(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (start(args[0]), *args[1:]) if args else args

        handle = self.layers[0].layer.register_forward_pre_hook(replace)
        try:
            yield
        finally:
            handle.remove()


def find_interleaving(backbone: nn.Module, switch: Switch) -> InterleavedForward | str:
    """The layers to interleave; or, as text, why this backbone cannot be interleaved.

    Call it once the engine is there: it looks up what ZeRO-3 has put on the weights.
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
    other_modules = [child for child in parent.children() if child is not layers]
    pairs = [LayerPair(layer, switch(layer), _policy_in_use_sets(layer)) for layer in layers]
    return InterleavedForward(pairs, other_modules)


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run another forward in the module's place, between its hooks, while inside."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _policy_in_use_sets(layer: nn.Module) -> list[InUse]:
    """ZeRO-3's in-use sets of the layer's weights, without the frozen reference adapter's."""
    return in_use_sets(p for name, p in layer.named_parameters() if f".{lora.REFERENCE}." not in name)
