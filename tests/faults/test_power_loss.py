"""Power loss at the moment of a commit: a whole checkpoint had reached the disk. Needs root, for a disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import run_ranks
from small_runs import changed, train

from madpo.trainer.checkpoints import saver
from madpo.trainer.checkpoints.choose import choose
from madpo.trainer.config.schema import Config

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
LIMITED = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1, "eval_steps": None, "export": False}


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a file cannot be mounted as a disk here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def disk(tmp_path) -> Path:
    image = tmp_path / "disk"
    if os.geteuid() or shutil.which("mkfs.ext4") is None:
        pytest.skip("needs root and mkfs.ext4")
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    return image


def copying(shard, run: Config, image: str, moment: str) -> None:
    """Train, and copy what is on the disk, not what is only in memory, at a moment of the second commit."""
    remove_old = saver.remove_old

    def copy() -> None:
        if (Path(run.output_dir) / "checkpoints" / "step-00000004").is_dir():
            shutil.copy(image, f"{image}.copy")

    def removing(*args: Any) -> None:
        if moment == "before the old one is deleted":
            copy()
        remove_old(*args)
        if moment == "after that":
            copy()

    setattr(saver, "remove_old", removing)  # noqa: B010
    train(shard, run)


def chosen(shard, root: str) -> int | None:
    found = choose(Path(root), {}, shard)
    return found and found.manifest.state.step


@pytest.mark.parametrize("moment", ["before the old one is deleted", "after that"])
@pytest.mark.parametrize("in_background", [False, True])
def test_the_checkpoint_that_was_committed_is_on_the_disk(config, disk, tmp_path, moment, in_background):
    """Of the only other one it does not matter whether it is still there."""
    train_ = {**LIMITED, "async_save": in_background}
    with mounted(disk, tmp_path / "before"):
        run = changed(config, output_dir=str(tmp_path / "before" / "run"), train=train_)
        run_ranks(2, copying, run, str(disk), moment)
    with mounted(Path(f"{disk}.copy"), tmp_path / "after"):
        root = tmp_path / "after" / "run" / "checkpoints"
        assert run_ranks(2, chosen, str(root)) == [4, 4]
