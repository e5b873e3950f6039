"""Defaults that depend on what is trained: a rate that suits an adapter ruins a whole model."""

from __future__ import annotations

import os.path
from enum import Enum
from pathlib import Path
from typing import Any

from madpo.trainer.config.run_config import as_block
from madpo.trainer.objectives.build import ALIASES, BoundObjective, bind
from madpo.trainer.objectives.registry import OBJECTIVES


class Kind(Enum):
    """What a run trains, as far as its defaults depend on that."""

    SFT = "supervised training"
    REWARD = "reward models"
    PREFERENCE = "preferences"


LEARNING_RATE = {
    Kind.SFT: (2e-5, 2e-4),
    Kind.REWARD: (1e-5, 1e-4),
    Kind.PREFERENCE: (1e-6, 1e-5),
}
"""Kind -> `optim.lr` for all weights, and for an adapter. TRL's, but for all weights of a reward model, where
TRL's 1e-4 is meant for an adapter; the factor of ten between the two is TRL's too."""

EPOCHS = {Kind.SFT: 2.0, Kind.REWARD: 1.0, Kind.PREFERENCE: 1.0}
"""Kind -> `train.num_train_epochs`. Reward models and preferences overfit in a second pass."""


def kind_of(objective: BoundObjective) -> Kind:
    """What a run with this objective trains."""
    if objective.is_reward_model:
        return Kind.REWARD
    return Kind.SFT if objective.supervised else Kind.PREFERENCE


def usual_rate(kind: Kind, adapter: bool) -> float:
    return LEARNING_RATE[kind][adapter]


def with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """A config's mapping with `optim.lr` and `train.num_train_epochs` of its kind, where they are not set.

    A mapping whose objective is unknown stays as it is: the schema refuses it.
    """
    kind = _kind_in(as_block(tree.get("objective")))
    optim, train = tree.get("optim", {}), tree.get("train", {})
    if kind is None or not isinstance(optim, dict) or not isinstance(train, dict):
        return tree
    rate = usual_rate(kind, trains_adapter(tree))
    return {**tree, "optim": {"lr": rate, **optim}, "train": {"num_train_epochs": EPOCHS[kind], **train}}


def trains_adapter(tree: dict[str, Any]) -> bool:
    """Whether a config's mapping asks for a new adapter, or names a folder that holds one."""
    model = tree.get("model")
    name = model.get("model_name_or_path") if isinstance(model, dict) else None
    folder = Path(os.path.expanduser(name)) if isinstance(name, str) else None
    places = () if folder is None else (folder, folder / "model")  # of a run, the exported model
    return tree.get("peft") is not None or any(
        os.path.isfile(place / "adapter_config.json") for place in places
    )


def _kind_in(objective: Any) -> Kind | None:
    loss_type = objective.get("loss_type") if isinstance(objective, dict) else objective
    if isinstance(loss_type, list):  # several losses, in TRL's spelling
        return Kind.PREFERENCE
    name = ALIASES.get(loss_type, loss_type) if isinstance(loss_type, str) else None
    return kind_of(bind(OBJECTIVES[name].params())) if name in OBJECTIVES else None
