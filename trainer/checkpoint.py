"""Checkpoints: DeepSpeed's shards of weights and optimiser, and the run state beside them.

`checkpoints/step-00000010/` is named in `checkpoints/latest` only after every rank has written its
part, so that a run killed while saving resumes from the checkpoint before.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from madpo.trainer.dist import Shard, barrier
from madpo.trainer.state import TrainState

STATE_FILE = "train_state.json"


def save(engine: Any, root: Path, state: TrainState, shard: Shard, keep: int) -> None:
    """Write a checkpoint on all ranks, commit it, and delete all but the newest `keep`."""
    tag = f"step-{state.step:08d}"
    engine.save_checkpoint(str(root), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    if shard.is_main:
        state.save(root / tag / STATE_FILE)
    barrier()
    if shard.is_main:
        partial = root / "latest.partial"
        with partial.open("w") as file:
            file.write(tag)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, root / "latest")
        for old in sorted(root.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    barrier()


def latest(root: Path) -> str | None:
    """The tag of the newest committed checkpoint, or None."""
    pointer = root / "latest"
    return pointer.read_text().strip() if pointer.is_file() else None


def load(engine: Any, root: Path, tag: str, training: bool = True) -> TrainState:
    """Restore weights, and the optimiser when training. Raises ValueError if that fails."""
    path, _ = engine.load_checkpoint(
        str(root),
        tag=tag,
        load_module_strict=False,  # the frozen reference is not in it
        load_optimizer_states=training,
        load_lr_scheduler_states=False,
    )
    if path is None:
        raise ValueError(
            f"{root / tag}: the checkpoint could not be loaded; remove it, or train with --fresh"
        )
    return TrainState.load(root / tag / STATE_FILE)
