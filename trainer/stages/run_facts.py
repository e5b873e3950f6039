"""What a run writes of itself before its first step: config.yaml, run.json, data_report.json."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from madpo.trainer.checkpoints.choose import Chosen
from madpo.trainer.checkpoints.folders import MANIFEST, newest_checkpoint
from madpo.trainer.checkpoints.identity import LENGTH, shown
from madpo.trainer.config.schema import Config, dump
from madpo.trainer.data.training_data import Data
from madpo.trainer.dist import Shard
from madpo.trainer.files import read_object, write_atomically, write_object
from madpo.trainer.reports.progress import print_line


def is_exported(config: Config, folder: Path) -> bool:
    """Whether what a run exports at its end is there, and newer than the checkpoint that it is made of."""
    wanted = [(config.train.export, "model"), (config.train.export_merged, "merged")]
    newest = newest_checkpoint(folder / "checkpoints")
    assert newest is not None
    made = (newest / MANIFEST).stat().st_mtime
    paths = [folder / name for is_wanted, name in wanted if is_wanted]
    return all(path.is_dir() and path.stat().st_mtime >= made for path in paths)


def write_report(folder: Path, data: Data) -> None:
    """Write what was read and dropped; that this cannot be done is said once, and no reason to end a run."""
    try:
        write_object(folder / "data_report.json", data.report)
    except OSError as error:
        _say_once(f"{folder / 'data_report.json'} cannot be written ({error.strerror}); the run goes on")


@cache
def _say_once(text: str) -> None:
    print_line(text)


Extension = tuple[int, str]
"""The step at which a run was extended, and what changed."""


def extensions(folder: Path, chosen: Chosen | None, made_with: Mapping[str, Any]) -> list[Extension]:
    """The earlier extensions of the run, and the one of now if it is extended."""
    found = read_object(folder / "run.json").get("extended", []) if chosen else []
    extended: list[Extension] = [(at, text) for at, text in found]
    if chosen is not None:
        before = chosen.manifest.identity
        keys = [key for key in LENGTH if before[key] != made_with[key]]
        changes = [f"{key} {shown(before[key])} -> {shown(made_with[key])}" for key in keys]
        extended += [(chosen.manifest.state.step, ", ".join(changes))] if changes else []
    return extended


def describe_run(
    folder: Path,
    config: Config,
    command: str,
    shard: Shard,
    total_steps: int,
    end_of_turn: int | None,
    extended: Sequence[Extension],
) -> None:
    """Write config.yaml and run.json: the command, the length of the run, the versions, the hardware."""
    write_atomically(folder / "config.yaml", dump(config))
    on_gpu = torch.cuda.is_available()
    run = {
        "command": command,
        "total_steps": total_steps,
        "end_of_turn": end_of_turn,
        "world_size": shard.world_size,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "host_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
        "started": time.time(),
        "extended": extended,
    }
    write_object(folder / "run.json", run)


def versions() -> dict[str, str]:
    """The versions of this package and of those that decide its numbers."""
    return {
        "madpo": version("madpo"),
        "torch": torch.__version__,  # with its build, which a wheel's metadata may leave out
        **{name: version(name) for name in ("deepspeed", "transformers", "datasets")},
    }
