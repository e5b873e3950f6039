"""Activations that wait for the backward pass in host memory.

What a decoder layer saves is copied out while the next layer computes, and copied back while the layer above
it runs backward. Weights are not copied, neither ZeRO-3's gathered ones nor views of them: those are gathered
again. With activation checkpointing a layer saves its input alone, so only that is copied.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from madpo.trainer.errors import UserError

MIN_BYTES = 2**20
"""Smaller tensors stay on the device."""


def offload_layers(model: PreTrainedModel, min_bytes: int = MIN_BYTES) -> None:
    """From now on, keep what decoder layers save for backward in host memory, pinned where there is a GPU.

    All but the last layer, whose backward pass comes at once. No bit of a gradient changes. Raises UserError
    for a model whose layers are not known.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"model.activation_offloading: which of {type(model).__name__}'s modules are its layers is not "
            "known; set it to false"
        )
    stream = CopyStream()
    for layer in layers[:-1]:
        offload = LayerOffload(layer, stream, min_bytes)
        layer.register_forward_pre_hook(offload.enter, with_kwargs=True)
        layer.register_forward_hook(offload.leave, always_call=True)


class CopyStream:
    """The copies of one model; on GPUs a CUDA stream of their own.

    A tensor is let go, and its memory used again, only after the computing stream has waited for its copy:
    at most one layer is on device and host at once.
    """

    def __init__(self) -> None:
        self.stream: Any = None
        self.departing: tuple[list[Tensor], Any] = [], None  # tensors that are being copied out, an event
        self.last: weakref.ref[LayerActivations] | None = None

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy behind all work that the computing stream has so far."""
        device = source.device if source.is_cuda else target.device
        if device.type != "cuda":
            target.copy_(source)
            return
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def event(self) -> Any:
        """An event after the copies enqueued so far; None where copies are done at once."""
        return None if self.stream is None else self.stream.record_event()

    def depart(self, tensors: list[Tensor]) -> None:
        """Hold these tensors until the next call, and let those of the last call go."""
        wait_for(self.departing[1])
        self.departing = tensors, self.event()


def wait_for(event: Any) -> None:
    """Have the computing stream wait for an event of the copies, if there is one."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


class HostCopy:
    """One piece of memory on the host, and on its device again while it is needed there."""

    def __init__(self, tensor: Tensor, stream: CopyStream) -> None:
        self.stream, self.device, self.uses = stream, tensor.device, 0
        whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(tensor.untyped_storage())
        self.host = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=whole.is_cuda)
        self.on_device: Tensor | None = None
        stream.copy(self.host, whole)

    def bring_back(self) -> None:
        self.on_device = torch.empty_like(self.host, device=self.device)
        self.stream.copy(self.on_device, self.host)


class SavedHandle(NamedTuple):
    """What autograd saves in place of a tensor: where the tensor is in which host copy."""

    copy: HostCopy
    activations: LayerActivations
    dtype: torch.dtype
    view: tuple[int, tuple[int, ...], tuple[int, ...]]  # offset, shape, strides


class LayerActivations:
    """What one layer saved in one forward pass, and a link to the layer below while that is alive."""

    def __init__(self, stream: CopyStream) -> None:
        self.stream, self.below = stream, stream.last
        self.copies: dict[int, HostCopy] = {}
        self.arrival: Any = None
        self.requested = False
        stream.last = weakref.ref(self)

    def add(self, tensor: Tensor) -> SavedHandle:
        """Copy a tensor out. Memory that several operations save, whole or in part, is copied once.

        The caller keeps the tensor alive until the layer is left, so that no other can have its address.
        """
        address = _address(tensor)
        if address not in self.copies:
            self.copies[address] = HostCopy(tensor, self.stream)
        copy = self.copies[address]
        copy.uses += 1
        view = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
        return SavedHandle(copy, self, tensor.dtype, view)

    def request(self) -> None:
        """Start all copies back, unless they were started before."""
        if not self.requested:
            self.requested = True
            for copy in self.copies.values():
                copy.bring_back()
            self.arrival = self.stream.event()

    def take(self, handle: SavedHandle) -> Tensor:
        """The tensor as it was, and a start of the copies of the layer below. Strides are restored too: a
        kernel may round otherwise where they differ."""
        self.request()
        below = self.below() if self.below is not None else None
        if below is not None:
            below.request()
        copy = handle.copy
        if copy.on_device is None:  # unpacked more often than saved
            copy.bring_back()
            self.arrival = self.stream.event()
        wait_for(self.arrival)
        assert copy.on_device is not None
        memory = copy.on_device.untyped_storage()
        copy.uses -= 1
        if copy.uses <= 0:
            copy.on_device = None
        return torch.empty(0, dtype=handle.dtype, device=copy.device).set_(memory, *handle.view)


class LayerOffload:
    """The hooks before and after a layer's forward pass."""

    def __init__(self, layer: nn.Module, stream: CopyStream, min_bytes: int) -> None:
        self.stream, self.min_bytes = stream, min_bytes
        self.own = [*layer.parameters(), *layer.buffers()]
        self.entered: tuple[saved_tensors_hooks, list[Tensor]] | None = None

    def enter(self, layer: nn.Module, args: Any, options: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        activations, departing = LayerActivations(self.stream), list[Tensor]()
        # Every layer gets the same rotary embedding and saves it.
        shared = [x for x in tree_leaves(options) if isinstance(x, Tensor)]

        def pack(tensor: Tensor) -> Tensor | SavedHandle:
            memory = tensor.untyped_storage()
            if not tensor.is_floating_point() or memory.nbytes() < self.min_bytes:
                return tensor
            # ZeRO-3 moves weights, so their addresses are asked for each time.
            if memory.data_ptr() in {_address(other) for other in (*self.own, *shared)}:
                return tensor
            departing.append(tensor)
            return activations.add(tensor)

        hooks = saved_tensors_hooks(
            pack, lambda x: x.activations.take(x) if isinstance(x, SavedHandle) else x
        )
        self.entered = hooks, departing
        hooks.__enter__()

    def leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self.entered is not None:
            (hooks, departing), self.entered = self.entered, None
            hooks.__exit__()
            self.stream.depart(departing)


def _address(tensor: Tensor) -> int:
    """The address of a tensor's memory, equal for all views of it."""
    return tensor.untyped_storage().data_ptr()
