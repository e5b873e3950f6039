"""Activations that wait for the backward pass in host memory.

What a decoder layer saves is copied out while the next layer computes, and copied back while the layer above
runs backward. Weights are left alone, ZeRO-3's gathered ones and views of them too: those are gathered again.
With checkpointing a layer saves its input and nothing else, so only that is copied.
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
"""Smaller tensors stay where they are."""


def offload_layers(model: PreTrainedModel, min_bytes: int = MIN_BYTES) -> None:
    """From now on, what the decoder layers save for their backward pass is held in host memory, pinned where
    there is a GPU; not of the last layer, whose backward pass comes at once. No bit of a gradient changes.

    Raises UserError for a model whose layers are not known as such.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"model.activation_offloading: which of {type(model).__name__}'s modules are its layers is not "
            "known; set it to false"
        )
    lane = Lane()
    for layer in layers[:-1]:
        offload = LayerOffload(layer, lane, min_bytes)
        layer.register_forward_pre_hook(offload.enter, with_kwargs=True)
        layer.register_forward_hook(offload.leave, always_call=True)


class Lane:
    """The copies of one model: on GPUs a stream of their own. A tensor is let go, and its memory used again,
    only after the computing stream has waited for its copy, so that one layer at most is held twice."""

    def __init__(self) -> None:
        self.stream: Any = None
        self.departing: tuple[list[Tensor], Any] = [], None
        self.last: weakref.ref[Cargo] | None = None

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy behind everything that the computing stream was told so far."""
        device = source.device if source.is_cuda else target.device
        if device.type != "cuda":
            target.copy_(source)
            return
        self.stream = self.stream or torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """The point that the copies enqueued so far reach; None where they are done."""
        return None if self.stream is None else self.stream.record_event()

    def depart(self, tensors: list[Tensor]) -> None:
        """Hold these until the next call, and let those of the last call go."""
        wait_for(self.departing[1])
        self.departing = tensors, self.mark()


def wait_for(mark: Any) -> None:
    if mark is not None:
        torch.cuda.current_stream().wait_event(mark)


class Parcel:
    """One piece of memory, host side, and on its device again for as long as it is needed there."""

    def __init__(self, tensor: Tensor, lane: Lane) -> None:
        self.lane, self.device, self.uses = lane, tensor.device, 0
        whole = torch.empty(0, dtype=torch.uint8, device=self.device).set_(tensor.untyped_storage())
        self.host = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=whole.is_cuda)
        self.back: Tensor | None = None
        lane.copy(self.host, whole)

    def bring_back(self) -> None:
        self.back = torch.empty_like(self.host, device=self.device)
        self.lane.copy(self.back, self.host)


class Slip(NamedTuple):
    """What autograd keeps in place of a tensor: where in which parcel it is."""

    parcel: Parcel
    cargo: Cargo
    dtype: torch.dtype
    place: tuple[int, tuple[int, ...], tuple[int, ...]]  # offset, shape, strides


class Cargo:
    """What one layer saved in one forward pass, and a link to the layer below it while that is alive."""

    def __init__(self, lane: Lane) -> None:
        self.lane, self.below = lane, lane.last
        self.parcels: dict[int, Parcel] = {}
        self.arrival: Any = None
        self.called = False
        lane.last = weakref.ref(self)

    def add(self, tensor: Tensor) -> Slip:
        """Memory that several operations save, whole or in part, is copied once. (It stays alive until the
        layer is left, so that no other can have its address.)"""
        memory = _memory(tensor)
        if memory not in self.parcels:
            self.parcels[memory] = Parcel(tensor, self.lane)
        parcel = self.parcels[memory]
        parcel.uses += 1
        place = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
        return Slip(parcel, self, tensor.dtype, place)

    def call(self) -> None:
        """Start all copies back, once."""
        if not self.called:
            self.called = True
            for parcel in self.parcels.values():
                parcel.bring_back()
            self.arrival = self.lane.mark()

    def take(self, slip: Slip) -> Tensor:
        """The tensor as it was, strides too: a kernel may round otherwise where they differ."""
        self.call()
        below = self.below() if self.below is not None else None
        if below is not None:
            below.call()
        parcel = slip.parcel
        if parcel.back is None:  # unpacked more often than saved
            parcel.bring_back()
            self.arrival = self.lane.mark()
        wait_for(self.arrival)
        assert parcel.back is not None
        memory = parcel.back.untyped_storage()
        parcel.uses -= 1
        if parcel.uses <= 0:
            parcel.back = None
        return torch.empty(0, dtype=slip.dtype, device=parcel.device).set_(memory, *slip.place)


class LayerOffload:
    """The hooks around a layer's forward pass."""

    def __init__(self, layer: nn.Module, lane: Lane, min_bytes: int) -> None:
        self.lane, self.min_bytes = lane, min_bytes
        self.own = [*layer.parameters(), *layer.buffers()]
        self.within: tuple[saved_tensors_hooks, list[Tensor]] | None = None

    def enter(self, layer: nn.Module, args: Any, options: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        cargo, held = Cargo(self.lane), list[Tensor]()
        # Every layer gets the same rotary embedding and saves it.
        shared = [x for x in tree_leaves(options) if isinstance(x, Tensor)]

        def pack(tensor: Tensor) -> Tensor | Slip:
            memory = tensor.untyped_storage()
            if not tensor.is_floating_point() or memory.nbytes() < self.min_bytes:
                return tensor
            # ZeRO-3 moves weights, so that where they are is asked each time.
            if memory.data_ptr() in {_memory(other) for other in (*self.own, *shared)}:
                return tensor
            held.append(tensor)
            return cargo.add(tensor)

        hooks = saved_tensors_hooks(pack, lambda x: x.cargo.take(x) if isinstance(x, Slip) else x)
        self.within = hooks, held
        hooks.__enter__()

    def leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self.within is not None:
            (hooks, held), self.within = self.within, None
            hooks.__exit__()
            self.lane.depart(held)


def _memory(tensor: Tensor) -> int:
    """The same for all views of one piece of memory."""
    return tensor.untyped_storage().data_ptr()
