"""The shards of a checkpoint, read by intervals of elements, whatever number of ranks has written them.

A rank's shard is a few flat tensors. In stage 3 every parameter is cut into as many equal pieces as there are
ranks (the last one padded), and a rank's pieces are strung together. In stages 1 and 2 whole parameters are
strung together, and that is cut into equal pieces. So where the elements of a parameter lie follows from its
size, the order of the parameters and the number of ranks. Shards are mapped into memory when they are first
asked for: no rank reads more than its own share and the files' headers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madpo.trainer.errors import CheckpointError
from madpo.trainer.zero3.shard_files import load_shard

MASTER = "fp32"
"""Our name for the master weights, beside the optimiser's names of its moments."""


class Piece(NamedTuple):
    """Elements of a flattened parameter, from `start` on: where one rank keeps them."""

    rank: int
    group: int  # number of the flat tensor
    offset: int  # place in the flat tensor
    start: int
    length: int


class Layout:
    """Where the elements of each trained parameter lie."""

    def __init__(
        self, shapes: Sequence[Mapping[str, torch.Size]], ranks: int, stage: int, shares: Sequence[int]
    ) -> None:
        """`shapes` has a table for each flat tensor, name -> shape. `shares` are the elements of one rank's
        share of each, for stages 1 and 2."""
        self._ranks, self._stage, self._shares = ranks, stage, shares
        self.sizes = {name: math.prod(shape) for group in shapes for name, shape in group.items()}
        # Number of the flat tensor, and the place in it; below stage 3 in that of all ranks together.
        self._places: dict[str, tuple[int, int]] = {}
        for number, group in enumerate(shapes):
            offset = 0
            for name in group:
                self._places[name] = number, offset
                offset += math.ceil(self.sizes[name] / ranks) if stage == 3 else self.sizes[name]

    def group_of(self, name: str) -> int:
        """The number of the flat tensor that holds the parameter."""
        return self._places[name][0]

    def pieces(self, name: str, start: int, end: int) -> Iterator[Piece]:
        """Where the elements from `start` to before `end` of a parameter lie, in their order."""
        group, offset = self._places[name]
        if self._stage == 3:
            share, before = math.ceil(self.sizes[name] / self._ranks), 0
        else:  # the parameter begins somewhere in the whole, and a share begins at 0
            share, before, offset = self._shares[group], offset, 0
        while start < end:
            rank, inside = divmod(before + start, share)
            length = min(end - start, share - inside)
            yield Piece(rank, group, offset + inside, start, length)
            start += length

    def own(self, rank: int) -> Iterator[tuple[str, Piece]]:
        """All that one rank keeps: name of the parameter, and piece."""
        for name, size in self.sizes.items():
            for piece in self.pieces(name, 0, size):
                if piece.rank == rank:
                    yield name, piece


class Shards:
    """The shards in a checkpoint's folder. Only files that are named in `files` are opened."""

    def __init__(self, folder: Path, files: Sequence[str], ranks: int, stage: int) -> None:
        self.folder, self._ranks, self.stage = folder, ranks, stage
        self._names = frozenset(files)
        self._open: dict[str, dict[str, Any]] = {}
        optimizer = next((name for name in sorted(files) if name.endswith("_optim_states.pt")), None)
        if optimizer is None:
            raise CheckpointError(f"{folder}: there is no optimiser in it")
        self._prefix = optimizer[: optimizer.index("zero_pp_rank_")]
        self.head = self._load(self._model_file(0))
        shares = self._shares(len(self.head["param_shapes"]))
        self.layout = Layout(self.head["param_shapes"], ranks, stage, shares)

    def state_like(self, name: str, flat: Tensor) -> dict[str, Any]:
        """What the optimiser keeps for a parameter: its moments as zeros of the size of `flat` (k,), to be
        filled, and numbers, such as that of its steps, as they are."""
        state = self._states(0).get(self.layout.group_of(name), {})  # none before the first update
        return {
            key: torch.zeros_like(flat, dtype=value.dtype) if _is_flat(value) else copy.deepcopy(value)
            for key, value in state.items()
        }

    def read_into(self, target: Tensor, key: str, name: str, start: int) -> None:
        """Fill `target` (k,) with the elements of a parameter's moment `key`, or MASTER, from `start` on."""
        for piece in self.layout.pieces(name, start, start + target.numel()):
            source = self._flat(key, piece.rank, piece.group).narrow(0, piece.offset, piece.length)
            target.narrow(0, piece.start - start, piece.length).copy_(source)

    def read_frozen_into(self, target: Tensor, name: str, start: int) -> None:
        """Fill `target` (k,) with the elements of a parameter that was saved although it is not trained."""
        if self.stage < 3:
            target.copy_(self.head["module"][name].reshape(-1).narrow(0, start, target.numel()))
            return
        share = math.ceil(math.prod(self.head["frozen_param_shapes"][name]) / self._ranks)
        done = 0
        while done < target.numel():
            rank, inside = divmod(start + done, share)
            length = min(target.numel() - done, share - inside)
            source = self._load(self._model_file(rank))["frozen_param_fragments"][name]
            target.narrow(0, done, length).copy_(source.narrow(0, inside, length))
            done += length

    @property
    def frozen(self) -> frozenset[str]:
        """Names of parameters that were saved although they are not trained; below stage 3, others too."""
        return frozenset(self.head["module"] if self.stage < 3 else self.head["frozen_param_shapes"] or ())

    def _shares(self, groups: int) -> list[int]:
        """How many elements rank 0 has of each flat tensor. Moments tell it, as they keep their padding."""
        masters, states = self._masters(0), self._states(0)
        shares = []
        for group in range(groups):
            moments = filter(_is_flat, states.get(group, {}).values())
            shares.append(next(moments, masters[group]).numel())
        return shares

    def _load(self, name: str) -> dict[str, Any]:
        if name not in self._names:
            raise CheckpointError(f"{self.folder}: its manifest has no {name}")
        if name not in self._open:
            self._open[name] = load_shard(self.folder / name, mmap=True)
        return self._open[name]

    def _model_file(self, rank: int) -> str:
        sharded = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        return sharded if sharded in self._names else "mp_rank_00_model_states.pt"

    def _optimizer(self, rank: int) -> dict[str, Any]:
        name = f"{self._prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        return self._load(name)["optimizer_state_dict"]

    def _states(self, rank: int) -> dict[int, dict[str, Any]]:
        """What the optimiser keeps for each flat tensor."""
        shard = self._optimizer(rank)
        inner = "optimizer_state_dict" if "optimizer_state_dict" in shard else "base_optimizer_state"
        return shard[inner]["state"]

    def _flat(self, key: str, rank: int, group: int) -> Tensor:
        if key != MASTER:
            return self._states(rank)[group][key]
        return self._masters(rank)[group]

    def _masters(self, rank: int) -> list[Tensor]:
        shard = self._optimizer(rank)
        name = "fp32_flat_groups" if "fp32_flat_groups" in shard else "single_partition_of_fp32_groups"
        return shard[name]


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1
