"""Folds of a data set by prompt: a model may judge the fold that it was not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from madpo.trainer.errors import UserError

if TYPE_CHECKING:
    from madpo.trainer.data.dataset import GroupDataset


def folds_of(
    prompt_hashes: np.ndarray,  # (G,)
    folds: int,
) -> np.ndarray:
    """(G,) the fold of every group: hash mod `folds`, so equal prompts share a fold, in any data set."""
    return prompt_hashes % folds


def without_fold(groups: GroupDataset, folds: int, fold: int) -> GroupDataset:
    """The groups of all folds but `fold`. Raises UserError if that leaves none, or takes none out."""
    inside = folds_of(groups.prompt_hashes, folds) == fold
    if inside.all() or not inside.any():
        raise UserError(
            f"data.fold: {groups.name} has {int(inside.sum())} of its {len(groups)} groups in fold {fold} of "
            f"{folds}; equal prompts stay together, and it has {len(np.unique(groups.prompt_hashes))} "
            "different ones; use fewer folds"
        )
    return groups.select(np.flatnonzero(~inside), f"{groups.name} without fold {fold} of {folds}")
