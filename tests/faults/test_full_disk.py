"""A file system that is really full: every message is one line, and with room again no bit is lost."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import run_ranks
from small_runs import changed, train

from madpo.trainer.checkpoints.folders import name_of
from madpo.trainer.checkpoints.manifest import read
from madpo.trainer.config.schema import Config
from madpo.trainer.files import Entry

pytestmark = [pytest.mark.ranks, pytest.mark.slow]
SHORT = {"max_steps": 6, "save_steps": 2, "eval_steps": None, "export": False, "num_train_epochs": 9.0}


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[Callable[[], None]]:
    """Context manager: a file system of that size at a place; yields what makes it larger."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    done = subprocess.run([*mount, f"size={kilobytes}k", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield lambda: subprocess.run([*mount, "remount,size=64m", place], check=True) and None
    finally:
        subprocess.run(["umount", place], check=True)


def shards(run: Config) -> dict[str, Entry]:
    return dict(read(Path(run.output_dir) / "checkpoints" / name_of(6)).files)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_full_disk_ends_a_run_with_a_word_and_costs_no_bit(config, tmp_path, capfd):
    """Full for each of the checkpoints, and in the middle of one."""
    whole = changed(config, output_dir=str(tmp_path / "whole"), train=SHORT)
    run_ranks(2, train, whole)
    for kilobytes in (60, 400, 600, 1100, 1500):
        with small_disk(tmp_path / f"of {kilobytes}", kilobytes) as make_room:
            run = changed(whole, output_dir=str(tmp_path / f"of {kilobytes}" / "run"))
            with pytest.raises(AssertionError, match="the run ends without a checkpoint of its last step 6"):
                run_ranks(2, train, run)
            lines = capfd.readouterr().out.splitlines()
            said = [line for line in lines if line.startswith("no checkpoint of step ")]
            assert said and all(re.search(r" GB free and .*; make room|No space left", line) for line in said)
            make_room()
            run_ranks(2, train, run)
            assert shards(run) == shards(whole), kilobytes
