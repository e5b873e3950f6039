"""SIGKILL inside a save and at random moments: the run goes on to the bits of one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from harness import own_port, run_ranks, without_clock
from patience import patient
from small_runs import changed, config_of, records, tensors_in, train

from madpo.trainer.checkpoints import folders, manifest, saver
from madpo.trainer.checkpoints.folders import MANIFEST, newest_checkpoint
from madpo.trainer.checkpoints.manifest import read
from madpo.trainer.config.schema import Config
from madpo.trainer.zero3 import shard_files
from madpo.trainer.zero3.shard_files import load_shard

pytestmark = pytest.mark.ranks
STEPS = 12
SHORT = {"max_steps": STEPS, "save_steps": 3, "eval_steps": None, "export": False, "num_train_epochs": 9.0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tokenizer_folder) -> Config:
    run = changed(config_of(tmp_path_factory.mktemp("kills"), tokenizer_folder), train=SHORT)
    run_ranks(2, train, run)
    return run


def result(run: Config) -> tuple[Any, Any]:
    """The bits of the last checkpoint's masters and moments, and the metrics of every line."""
    newest = newest_checkpoint(Path(run.output_dir) / "checkpoints")
    assert newest is not None and newest.name == folders.name_of(STEPS)
    names = sorted(name for name in read(newest).files if "optim" in name)
    found = [
        tensor.detach().numpy().tobytes()
        for name in names
        for tensor in tensors_in(load_shard(newest / name))
    ]
    return found, [without_clock(record) for record in records(Path(run.output_dir))]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(module: Any, name: str, when: Callable[..., bool]) -> None:
    """Kill this process when a function is called with such arguments, before it does anything."""
    original = getattr(module, name)

    def killing(*args: Any, **options: Any) -> Any:
        if when(*args):
            die()
        return original(*args, **options)

    setattr(module, name, killing)


SECOND = folders.name_of(6)


def is_of_second(path: Any) -> bool:
    """Whether a path leads into the second checkpoint, or to it."""
    return SECOND in str(path)


def file_of(number: Any) -> str:
    return os.readlink(f"/proc/self/fd/{number if isinstance(number, int) else number.fileno()}")


def in_a_shard(kind: str) -> Callable[[], None]:
    """Half of a shard of the second checkpoint is in its file."""
    return lambda: before(
        shard_files._Hashed,
        "write",
        lambda file, _: is_of_second(file._file.name) and kind in file._file.name and file._size > 5000,
    )


def second_of_shards() -> Callable[..., bool]:
    """Whether the ranks tell each other what they have written, for the second time."""
    times = 0

    def is_second(own: Any, _: Any) -> bool:
        nonlocal times
        times += isinstance(own, dict) and any("optim" in str(name) for name in own)
        return times == 2

    return is_second


POINTS: dict[str, tuple[int, Callable[[], None]]] = {
    "rank 0 within its model": (0, in_a_shard("model_states")),
    "rank 0 within its optimiser": (0, in_a_shard("optim_states")),
    "rank 1 within its optimiser": (1, in_a_shard("optim_states")),
    "rank 1 before its shard is on the disk": (
        1,
        lambda: before(os, "fsync", lambda number: is_of_second(file_of(number))),
    ),
    "rank 0 before the manifest": (
        0,
        lambda: before(manifest.Manifest, "write", lambda _, folder: is_of_second(folder)),
    ),
    "rank 0 before the manifest has its name": (
        0,
        lambda: before(os, "replace", lambda _, target: is_of_second(target) and MANIFEST in str(target)),
    ),
    "rank 0 before the rename": (
        0,
        lambda: before(os, "replace", lambda _, target: Path(target).name == SECOND),
    ),
    "rank 0 after the rename": (
        0,
        lambda: before(saver, "flush_folder", lambda root: (root / SECOND).is_dir()),
    ),
    "rank 0 before old ones are deleted": (
        0,
        lambda: before(saver, "remove_old", lambda _, step, *__: step == 9),
    ),
    "rank 0 within an old one": (0, lambda: before(os, "rmdir", lambda path, **_: "step-" in str(path))),
    "rank 1 when all is written": (1, lambda: before(saver, "gathered", second_of_shards())),
}
"""Where a rank is killed: the rank, and how it is prepared."""
FAST = ("rank 1 within its optimiser",)


def killed(run: Config, rank: int, prepare: Callable[[], None] | None, seconds: float | None = None) -> bool:
    """Train on two forked ranks, one of which is killed at its point or after some time. Whether it was."""
    context = mp.get_context("fork")
    with own_port() as port:
        ranks = [
            context.Process(target=_rank, args=(n, port, run, prepare if n == rank else None)) for n in (0, 1)
        ]
        for process in ranks:
            process.start()
        try:
            if seconds is not None:
                ranks[rank].join(seconds)
                if ranks[rank].is_alive():
                    ranks[rank].kill()
            deadline = time.monotonic() + patient(60)
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
            assert not any(process.is_alive() for process in ranks), "a rank waits for the one that is gone"
        finally:
            for process in ranks:
                process.kill()
                process.join()
    return ranks[rank].exitcode == -signal.SIGKILL


def _rank(rank: int, port: int, run: Config, prepare: Callable[[], None] | None) -> None:
    from harness import _leave_out_checks

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    _leave_out_checks()
    if prepare is not None:
        prepare()
    try:
        train(None, run)
    except BaseException:
        os._exit(1)
    os._exit(0)


def copied(undisturbed: Config, tmp_path: Path, **sections: Any) -> Config:
    return changed(undisturbed, output_dir=str(tmp_path / "run"), **sections)


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=[] if point in FAST else [pytest.mark.slow]) for point in POINTS]
)
@pytest.mark.parametrize("in_background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_kill_within_a_save_costs_no_bit(undisturbed, tmp_path, point, in_background):
    run = copied(undisturbed, tmp_path, train={"async_save": in_background})
    rank, prepare = POINTS[point]
    assert killed(run, rank, prepare), "the point was never reached"
    assert newest_checkpoint(Path(run.output_dir) / "checkpoints") is not None
    run_ranks(2, train, run)
    assert result(run) == result(undisturbed)
    left = sorted(path.name for path in (Path(run.output_dir) / "checkpoints").iterdir())
    assert left == [folders.name_of(STEPS - 3), folders.name_of(STEPS)]


@pytest.mark.slow
def test_fifty_kills_at_random_moments_cost_no_bit(undisturbed, tmp_path):
    """Of one rank or the other, at any time of a life; the run comes to its end all the same."""
    random_ = random.Random(20261201)
    # A rank waits so long for one that was killed before they met; no launcher ends it here.
    waits = {"start_timeout_minutes": 0.5}
    run = copied(undisturbed, tmp_path, train={"save_steps": 1, "async_save": True}, launch=waits)
    kills = ends = 0
    while kills < 50:
        if killed(run, random_.choice((0, 1)), None, random_.uniform(0.2, 3.0)):
            kills += 1
            continue
        ends += 1
        if ends % 5 == 0:  # and again from the beginning
            shutil.rmtree(run.output_dir)
    run_ranks(2, train, run)
    want, got = result(undisturbed), result(run)
    assert got[0] == want[0]
    assert (Path(run.output_dir) / "checkpoints" / folders.name_of(STEPS) / MANIFEST).is_file()
    assert json.loads((Path(run.output_dir) / ".owner.json").read_text())["life"] > 1
