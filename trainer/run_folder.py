"""The files of a run folder, and how to read them back.

config.yaml         the resolved configuration
run.json            the command, the length of the run, the versions, the hardware
data_report.json    what was read, cut and dropped
metrics.jsonl       one line per log step and evaluation
held_out_pairs.json the margin of every held-out pair, at the newest evaluation during training
evaluation.json     the result of `madpo evaluate`
generated/          completions and their scores, from `madpo generate`
pairs/              preference pairs made of those completions
checkpoints/        weights, optimiser and state to resume from
model/              the exported model, or the adapter
merged/             with train.export_merged: the model with the adapter in it
log.txt             what rank 0 printed, and the errors of all ranks; a header for every start
report.html
"""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from madpo.trainer.dist import Shard, raise_if_any
from madpo.trainer.errors import UserError
from madpo.trainer.files import make_folder

METRICS, LOCK = "metrics.jsonl", ".lock"


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
        if not isinstance(record, dict) or "step" not in record:
            raise UserError(f"{path}:{number}: not an object with a step; mend or remove the line")
        records.append(record)
    return records


def last_evaluation(folder: Path) -> dict[str, Any]:
    """A run's newest evaluation, from training or from `madpo evaluate`; {} if there is none."""
    for record in reversed(read_metrics(folder)):
        if "eval_loss" in record:
            return record
    path = folder / "evaluation.json"
    return json.loads(path.read_text()) if path.exists() else {}


def newest_checkpoint(checkpoints: Path) -> str | None:
    """The name of the newest committed checkpoint in that folder; None if there is none."""
    pointer = checkpoints / "latest"
    return pointer.read_text().strip() if pointer.is_file() else None


def step_of(checkpoint: str) -> int:
    """The step of the checkpoint of that name, as in step-00000100."""
    return int(checkpoint.removeprefix("step-"))


def check_trained(folder: Path, task: str) -> None:
    """Raise UserError if the folder holds no checkpoint that this task could work on."""
    if newest_checkpoint(folder / "checkpoints") is not None:
        return
    what = "holds no checkpoint" if folder.is_dir() else "is not there"
    other = ", or evaluate the model that training starts from: --base" if task == "evaluate" else ""
    raise UserError(f"output_dir: {folder} {what}; train first, name the folder of a run{other}")


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
    """Rename an earlier run's folder, so that a fresh run can start and nothing is lost."""
    if folder.exists():
        number = 1
        while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(target)
        print(f"earlier run moved to {target}", flush=True)


def claim(folder: Path, shard: Shard) -> FileLock:
    """Lock the run folder. Raises UserError on all ranks if another run has locked it or we may not write."""
    lock = FileLock(folder / LOCK, timeout=0)
    problem = None
    if shard.is_main:
        try:
            make_folder("output_dir", folder)
            lock.acquire()
        except Timeout:
            problem = f"output_dir: another run is training into {folder}; stop it, or use another folder"
        except OSError as error:
            problem = f"output_dir: {folder} cannot be locked ({error.strerror}); name another folder"
        except UserError as error:
            problem = str(error)
    raise_if_any(problem)
    return lock
