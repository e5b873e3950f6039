"""Folds of a data set by prompt: what a model has not been trained on, it can judge."""

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
    """(G,) the fold of every group, hash mod `folds`: groups of equal prompts share one, in any data set."""
    return prompt_hashes % folds


def without_fold(groups: GroupDataset, folds: int, fold: int) -> GroupDataset:
    """The groups of all folds but one. Raises UserError if there are none inside it or outside."""
    inside = folds_of(groups.prompt_hashes, folds) == fold
    if inside.all() or not inside.any():
        raise UserError(
            f"data.fold: {groups.name} has {int(inside.sum())} of its {len(groups)} groups in fold {fold} of "
            f"{folds}; equal prompts stay together, and it has {len(np.unique(groups.prompt_hashes))} "
            "different ones; use fewer folds"
        )
    return groups.select(np.flatnonzero(~inside), f"{groups.name} without fold {fold} of {folds}")
