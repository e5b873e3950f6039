"""Checkpoints: DeepSpeed's shards of weights and optimiser, and the run state beside them.

`checkpoints/step-00000010/` is named in `checkpoints/latest` only after every rank has written its
part, so that a run killed while saving resumes from the checkpoint before. What is resumed from is
rank 0's decision, and every rank must see the same folder.
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
from madpo.trainer.files import write_atomically
from madpo.trainer.state import TrainState

STATE_FILE = "train_state.json"
RANKS = "number of ranks"
STAGE = "deepspeed.zero_optimization.stage"


def identity(config: Config, shard: Shard, content: str | None = None) -> dict[str, Any]:
    """What must not change between a run and its continuation, as dotted keys. `content` is the data's."""
    out: dict[str, Any] = {RANKS: shard.world_size}
    for section, values in config.model_dump(mode="json", by_alias=True).items():
        flat = values if isinstance(values, dict) else {"": values}
        if section == "peft":  # whether there is one, too
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
    """The part of the identity that says which weights fit."""
    parts = ("model.", "peft", RANKS, STAGE)
    return {key: value for key, value in identity(config, shard).items() if key.startswith(parts)}


def save(
    engine: Engine,
    root: Path,
    state: TrainState,
    run: dict[str, Any],
    shard: Shard,
    keep: int,
    with_reference: bool = False,
) -> None:
    """Write a checkpoint on all ranks, commit it, and delete older ones but the newest `keep`.

    `run` is the identity that a continuation is compared with. The reference belongs into the checkpoint
    if it moves.
    """
    tag = f"step-{state.step:08d}"
    engine.save(root, tag, with_frozen=with_reference)
    if shard.is_main:
        content = {"state": dataclasses.asdict(state), "run": run}
        (root / tag / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n")
    # DeepSpeed 0.19's save_checkpoint ends with a barrier of its own, so that nothing would change today
    # without this one; it is here because the commit must not depend on that.
    barrier()
    if shard.is_main:
        write_atomically(root / "latest", tag)
        for old in sorted(path for path in root.glob("step-*") if path.name <= tag)[:-keep]:
            shutil.rmtree(old)
    barrier()


def latest(root: Path, run: dict[str, Any]) -> str | None:
    """The tag of the newest committed checkpoint, or None; the same on all ranks.

    Raises UserError if a rank cannot see it, or it is of another run: one of the keys in `run` had
    another value there.
    """
    pointer = root / "latest"
    tag = from_main(pointer.read_text().strip() if pointer.is_file() else None)
    if tag is None:
        return None
    raise_if_any(_problem(root / tag, run))
    return tag


def stored_objective(root: Path) -> dict[str, Any] | None:
    """The objective block of the newest committed checkpoint's run, with numbers for quantiles, or None."""
    pointer = root / "latest"
    path = root / pointer.read_text().strip() / STATE_FILE if pointer.is_file() else None
    if path is None or not path.is_file():
        return None
    run = json.loads(path.read_text())["run"]
    prefix = "objective."
    return {key.removeprefix(prefix): value for key, value in run.items() if key.startswith(prefix)}


def _problem(folder: Path, run: dict[str, Any]) -> str | None:
    path = folder / STATE_FILE
    if not path.is_file():
        return f"{folder}: rank 0 resumes from here, but it cannot be read; output_dir must be shared storage"
    then = json.loads(path.read_text())["run"]
    changed = [key for key in run if key not in then or then[key] != run[key]]
    if not changed:
        return None
    lines = "".join(f"\n  {key}: {then.get(key)!r} there, {run[key]!r} now" for key in changed)
    return (
        f"{folder} is a checkpoint of another run:{lines}\nset it back to continue that run; or train "
        "with --fresh, or into another output_dir"
    )


def load(engine: Engine, root: Path, tag: str) -> TrainState:
    """Restore weights and optimiser. Raises UserError on all ranks if one of them cannot."""
    is_there = engine.load(root, tag)
    raise_if_any(None if is_there else f"{root / tag}: the checkpoint cannot be loaded; train with --fresh")
    return TrainState(**json.loads((root / tag / STATE_FILE).read_text())["state"])
