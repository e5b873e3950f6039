"""What is read back from checkpoints: weights and state of a chosen one, the objective of the newest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from madpo.trainer.checkpoints.choose import Chosen
from madpo.trainer.checkpoints.folders import checkpoints_in
from madpo.trainer.checkpoints.manifest import DamagedError, read
from madpo.trainer.dist import raise_if_any
from madpo.trainer.engine import Engine
from madpo.trainer.errors import CheckpointError
from madpo.trainer.state import TrainState


def load(engine: Engine, chosen: Chosen) -> TrainState:
    """Restore weights and optimiser, on all ranks, and return the run's state. Raises CheckpointError."""
    manifest, problem = chosen.manifest, None
    try:
        engine.load(chosen.folder, list(manifest.files), manifest.world_size, manifest.zero_stage)
    except CheckpointError as error:
        problem = error
    raise_if_any(problem)
    return manifest.state


def stored_objective(root: Path) -> dict[str, Any] | None:
    """The objective block stored in the newest checkpoint that can be read, with its quantiles as numbers.

    None if there is none.
    """
    for checkpoint in checkpoints_in(root):
        try:
            stored = read(checkpoint).identity
        except DamagedError:
            continue
        prefix = "objective."
        return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    return None
