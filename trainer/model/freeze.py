"""Frozen parts of a model, by name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from madpo.trainer.errors import UserError
from madpo.trainer.zero3.parameters import real_size


def freeze(model: PreTrainedModel, parts: Iterable[str]) -> None:
    """Freeze the parts named: `embeddings`, `head`, or all weights whose name fits a pattern.

    Tied embeddings are one weight: either word freezes both. Raises UserError for a pattern that fits no
    weight, and if no weight is left to train.
    """
    ends: dict[str, Any] = {
        "embeddings": model.get_input_embeddings(),
        "head": model.get_output_embeddings() or getattr(model, "score", None),
    }
    names = dict(model.named_parameters(remove_duplicate=False))
    for part in parts:
        if part in ends:
            selected = list(ends[part].parameters())
        else:
            selected = [parameter for name, parameter in names.items() if fnmatchcase(name, part)]
        if not selected:
            raise UserError(
                f"model.freeze: no weight of {type(model).__name__} fits {part!r}; allowed are embeddings, "
                f"head and patterns of names like {', '.join(get_close_matches(part, names, n=3, cutoff=0))}"
            )
        for parameter in selected:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in names.values()):
        raise UserError("model.freeze: it leaves nothing to train")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters, by their whole sizes under ZeRO-3."""
    sizes = [(p.requires_grad, real_size(p)) for p in model.parameters()]
    return sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)
