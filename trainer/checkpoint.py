"""Checkpoints: DeepSpeed's shards of weights and optimiser, and the run state beside them.

`checkpoints/latest` names `step-00000010/` only after every rank has written its part, so a run killed
while saving resumes from the checkpoint before. Rank 0 decides which checkpoint a run resumes from; every
rank must see the same folder.

A checkpoint carries the run's identity: all config keys that change its numbers, the number of ranks, the
ZeRO stage and a fingerprint of the data. A run resumes only with an equal identity.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from madpo.trainer.config.deepspeed import zero_stage
from madpo.trainer.config.effects import may_continue
from madpo.trainer.config.schema import Config
from madpo.trainer.dist import Shard, barrier, from_main, raise_if_any
from madpo.trainer.engine import Engine
from madpo.trainer.errors import FRESH
from madpo.trainer.files import write_atomically
from madpo.trainer.run_folder import newest_checkpoint
from madpo.trainer.state import TrainState

STATE_FILE = "train_state.json"
RANKS = "number of ranks"
STAGE = "deepspeed.zero_optimization.stage"


def identity(config: Config, shard: Shard, content: str | None = None) -> dict[str, Any]:
    """What must not change between a run and its continuation: dotted key -> value.

    `content` is the fingerprint of the training data.
    """
    out: dict[str, Any] = {RANKS: shard.world_size}
    for section, values in config.model_dump(mode="json", by_alias=True).items():
        flat = values if isinstance(values, dict) else {"": values}
        if section == "peft":  # that there is an adapter at all counts too
            flat = {"": values is not None, **(values or {})}
        out |= {f"{section}.{key}".rstrip("."): value for key, value in flat.items()}
    router_loss = config.model.router_aux_loss_coef > 0
    fixed = [key for key in out if key == RANKS or not may_continue(key, router_loss)]
    out = {key: out[key] for key in fixed}
    out[STAGE] = zero_stage(config.deepspeed, shard.world_size)
    if content is not None:
        out["data (content)"] = content
    return out


def model_identity(config: Config, shard: Shard) -> dict[str, Any]:
    """The part of the identity that decides which weights can be loaded."""
    parts = ("model.", "peft", RANKS, STAGE)
    return {key: value for key, value in identity(config, shard).items() if key.startswith(parts)}


def save(
    engine: Engine,
    root: Path,
    state: TrainState,
    identity: dict[str, Any],
    shard: Shard,
    keep: int,
    with_reference: bool = False,
) -> None:
    """Write a checkpoint on all ranks, commit it, and delete all but the newest `keep`.

    A reference that moves belongs into the checkpoint (`with_reference`).
    """
    tag = f"step-{state.step:08d}"
    engine.save(root, tag, with_frozen=with_reference)
    if shard.is_main:
        content = {"state": dataclasses.asdict(state), "run": identity}
        (root / tag / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")
    # DeepSpeed 0.19's save_checkpoint ends with a barrier of its own, but the commit must not depend on it.
    barrier()
    if shard.is_main:
        write_atomically(root / "latest", tag)
        for old in sorted(path for path in root.glob("step-*") if path.name <= tag)[:-keep]:
            shutil.rmtree(old)
    barrier()


def latest(root: Path, identity: dict[str, Any]) -> str | None:
    """The tag of the newest committed checkpoint, equal on all ranks; None if there is none.

    Raises UserError if a rank cannot see it, or if one of the keys in `identity` has another value there.
    """
    tag = from_main(newest_checkpoint(root))
    if tag is None:
        return None
    raise_if_any(_problem(root / tag, identity))
    return tag


def stored_objective(root: Path) -> dict[str, Any] | None:
    """The objective block stored in the newest committed checkpoint, with its quantiles as numbers.

    None if there is no checkpoint.
    """
    tag = newest_checkpoint(root)
    path = root / (tag or "") / STATE_FILE
    if tag is None or not path.is_file():
        return None
    stored = json.loads(path.read_text())["run"]
    prefix = "objective."
    return {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}


def _problem(folder: Path, identity: dict[str, Any]) -> str | None:
    """Why a run of this identity cannot resume from the folder; None if it can."""
    path = folder / STATE_FILE
    if not path.is_file():
        return f"{folder}: rank 0 resumes from here, but it cannot be read; output_dir must be shared storage"
    stored = json.loads(path.read_text())["run"]
    changed = [key for key in identity if key not in stored or stored[key] != identity[key]]
    if not changed:
        return None
    lines = "".join(f"\n  {key}: {stored.get(key)!r} there, {identity[key]!r} now" for key in changed)
    return (
        f"{folder} is a checkpoint of another run:{lines}\nset it back to continue that run; or train "
        f"with {FRESH}, or into another output_dir"
    )


def load(engine: Engine, root: Path, tag: str) -> TrainState:
    """Restore weights and optimiser, and return the run's state. Raises UserError if a rank cannot."""
    is_loaded = engine.load(root, tag)
    raise_if_any(None if is_loaded else f"{root / tag}: the checkpoint cannot be loaded; train with {FRESH}")
    return TrainState(**json.loads((root / tag / STATE_FILE).read_text())["state"])
