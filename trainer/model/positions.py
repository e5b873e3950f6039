"""Rotary embeddings whose frequencies depend on the length of the sequence: `longrope` and `dynamic`.

transformers takes the largest position of a call for the length, and `dynamic` remembers the longest of all
calls. So a sequence in a packed row would get the frequencies of its longest neighbour, or of an earlier row.
`encode_by_sequence` gives every sequence those that it has alone, by calls of transformers' own code for the
tokens of one length at a time. Completions with other frequencies than their sibling's cannot share a prompt
with it: `Shapes.shares_prompts` says which can.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from madpo.trainer.data.lengths import PositionBorder


def position_borders(*models: PreTrainedModel | None) -> tuple[PositionBorder, ...]:
    """The lengths beyond which these models encode positions otherwise; empty for most."""
    modules = [module for model in models if model is not None for module in model.modules()]
    found = {_border(module, name) for module in modules for name in _rope_types(module)}
    return tuple(sorted(border for border in found if border))


def encode_by_sequence(model: PreTrainedModel) -> None:
    """Let the model's rotary embeddings encode each sequence of a row as if it were alone."""
    for module in model.modules():
        if any(_border(module, name) for name in _rope_types(module)):
            module.forward = partial(_forward, module)


def _rope_types(module: nn.Module) -> dict[str | None, str]:
    """Kind of layer -> rope type; the kind is None where all layers have one. Empty for other modules."""
    types = getattr(module, "rope_type", None)
    if isinstance(types, dict):
        return types
    return {None: types} if isinstance(types, str) else {}


def _border(module: Any, layer_type: str | None) -> PositionBorder | None:
    kind = _rope_types(module).get(layer_type, "")
    if "dynamic" in kind:
        return PositionBorder(module.original_max_seq_len, varies=True)
    if kind == "longrope":
        rope = module.config.rope_parameters
        rope = rope if layer_type is None else rope[layer_type]
        return PositionBorder(rope["original_max_position_embeddings"], varies=False)
    return None


def _forward(module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    """The rotary embedding of (rows, tokens) positions, each sequence's as if it were alone.

    In a row a sequence, or a prompt with the completions that share it, begins where the position is 0.
    """
    kind = () if layer_type is None else (layer_type,)

    def encode(positions: Tensor) -> Any:
        return type(module).forward(module, x, positions, *kind)

    border = _border(module, layer_type)
    if border is None:
        return encode(position_ids)
    if border.varies:
        encode(position_ids[:1, :1] * 0)  # transformers forgets longer sequences when it sees a short one
    if not (position_ids >= border.length).any():
        return encode(position_ids)
    lengths = _sequence_lengths(position_ids)
    is_long = lengths > border.length
    keys = torch.where(is_long, lengths, 0) if border.varies else is_long.long()
    order = [(keys == key).flatten().nonzero()[:, 0] for key in keys.unique().tolist()]
    parts = [encode(position_ids.flatten()[at][None]) for at in order]
    back = torch.cat(order).argsort()

    def together(*tensors: Tensor) -> Tensor:  # (1, tokens of one length, ...) each
        return torch.cat(tensors, dim=1)[0, back].unflatten(0, position_ids.shape)

    if isinstance(parts[0], Tensor):
        return together(*parts)
    return tuple(together(*tensors) for tensors in zip(*parts, strict=True))  # cosines, sines


def _sequence_lengths(
    position_ids: Tensor,  # (rows, tokens)
) -> Tensor:  # (rows, tokens)
    """The length of the sequence that each token belongs to; of a prompt that is shared, the longest."""
    begins = position_ids == 0
    begins[:, 0] = True
    number = begins.flatten().cumsum(0) - 1
    lengths = position_ids.new_zeros(position_ids.numel())
    lengths.scatter_reduce_(0, number, position_ids.flatten() + 1, "amax")
    return lengths[number].view_as(position_ids)
