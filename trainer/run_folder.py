"""The files of a run folder, and how to read them back.

config.yaml         the resolved configuration
run.json            the command, the length of the run, the versions, the hardware
data_report.json    what was read, cut and dropped
metrics.jsonl       one line per log step and evaluation
incidents.jsonl     steps that were skipped or whose gradient or loss stands out, with their rows
held_out_pairs.json the margin of every held-out pair, at the newest evaluation during training
evaluation.json     the result of `madpo evaluate`
generated/          completions and their scores, from `madpo generate`
pairs/              preference pairs made of those completions
checkpoints/        weights, optimiser and state to resume from
model/              the exported model, or the adapter
merged/             with train.export_merged: the model with the adapter in it
lives.jsonl         every start: where, from which step to which, how it ended
outcome.json        how the newest start has ended: exit status, what was said last
log.txt             what rank 0 printed, and the errors of all ranks; a header for every start
report.html
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from madpo.trainer.checkpoints.folders import checkpoints_in
from madpo.trainer.dist import Shard, from_main, raise_if_any
from madpo.trainer.errors import UserError
from madpo.trainer.files import make_folder, read_object, write_atomically

METRICS, INCIDENTS = "metrics.jsonl", "incidents.jsonl"
LOCK, OWNER = ".lock", ".owner.json"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; an empty list if there is no such file.

    A killed run may leave half a last line, which is ignored; a last line that only lacks its line feed
    counts. Raises UserError naming any other line that is not an object with a step.
    """
    path = folder / METRICS
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: {error}; mend or remove the line") from error
        if not isinstance(record, dict) or not _is_step(record.get("step")):
            raise UserError(f"{path}:{number}: not an object with a step; mend or remove the line")
        records.append(record)
    return records


def _is_step(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def last_evaluation(folder: Path) -> dict[str, Any]:
    """A run's newest evaluation, from training or from `madpo evaluate`; {} if there is none."""
    for record in reversed(read_metrics(folder)):
        if "eval_loss" in record:
            return record
    return read_object(folder / "evaluation.json")


def check_trained(folder: Path, task: str) -> None:
    """Raise UserError if the folder holds no checkpoint that this task could work on."""
    if checkpoints_in(folder / "checkpoints"):
        return
    what = "holds no checkpoint" if folder.is_dir() else "is not there"
    other = ", or evaluate the model that training starts from: --base" if task == "evaluate" else ""
    raise UserError(f"output_dir: {folder} {what}; train first, or name the folder of a run{other}")


def is_training(folder: Path) -> bool:
    """Whether a process holds the folder's lock; False where the lock file cannot be opened."""
    path = folder / LOCK
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def set_aside(folder: Path) -> None:
    """Rename an earlier run's folder, so that a fresh run can start and nothing is lost.

    Raises UserError if a run is training into it.
    """
    if not folder.exists():
        return
    with _locked(folder):
        number, target = 1, folder
        try:
            while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
                number += 1
            folder.rename(target)
        except OSError as error:  # another file system is mounted there, say
            raise UserError(
                f"output_dir: {folder} cannot be moved to {target} ({error.strerror}); name another folder"
            ) from None
        print(f"earlier run moved to {target}", flush=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises UserError that says who else does, or why it cannot be held."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"output_dir: another run {_owner(folder)}is training into {folder}; stop it, or use another "
            "folder"
        ) from None
    except OSError as error:
        reason = error.strerror
        raise UserError(f"output_dir: {folder} cannot be locked ({reason}); name another folder") from None


def _owner(folder: Path) -> str:
    """The process that has claimed the folder last, as text for the user."""
    owner = _read_owner(folder)
    return f"(process {owner.process} on {owner.host}) " if owner else ""


class Owner(NamedTuple):
    """Who has claimed a run folder last."""

    life: int  # the number of the start, counted from 1
    process: int
    host: str


def _read_owner(folder: Path) -> Owner | None:
    try:
        owner = Owner(**json.loads((folder / OWNER).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return owner if isinstance(owner.life, int) else None


class Claim:
    """The right of one start to write into a run folder, on all ranks; rank 0 holds the lock."""

    def __init__(self, folder: Path, lock: ExitStack, life: int) -> None:
        self._folder, self._lock, self.life = folder, lock, life

    def lost_to(self) -> str | None:
        """Why this start may write no more, if a later one has claimed the folder; else None.

        A lock alone does not stop a process that was frozen, or cut off from shared storage.
        """
        owner = _read_owner(self._folder)
        if owner is None or owner.life == self.life:
            return None
        return f"start {owner.life} of the run {_owner(self._folder)}has taken {self._folder} over"

    def release(self) -> None:
        self._lock.close()


def claim(folder: Path, shard: Shard) -> Claim:
    """Claim the run folder, on all ranks. Raises UserError if another run has it or we may not write."""
    lock, problem, life = ExitStack(), None, 0
    if shard.is_main:
        try:
            make_folder("output_dir", folder)
            lock.enter_context(_locked(folder))
            before = _read_owner(folder)
            life = before.life + 1 if before else 1
            owner = Owner(life, os.getpid(), socket.gethostname())
            write_atomically(folder / OWNER, json.dumps(owner._asdict()) + "\n")
        except UserError as error:
            problem = error
    raise_if_any(problem)
    return Claim(folder, lock, from_main(life))
