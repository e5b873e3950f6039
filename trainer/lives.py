"""`lives.jsonl`: every start of a run, where it ran, from which step to which, and how it ended.

A start that says nothing of its end was killed, or still runs. How much of the time between the first start
and now went into steps that are kept is the effective training time ratio (ETTR).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from madpo.trainer.dist import Shard, gathered, is_lost_peer
from madpo.trainer.errors import Exit, UserError
from madpo.trainer.stopping import StoppedError

NAME = "lives.jsonl"
JOBS = "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"
"""Variables in which launchers say what they call a job."""

SHOWN = 5
"""So many ends are told."""


@dataclass(frozen=True)
class Life:
    """One start of a run."""

    life: int  # counted from 1
    started: float  # seconds since 1970
    first_step: int
    ranks: int
    hosts: list[str]
    job: str
    madpo: str  # its version
    ended: float | None = None
    last_step: int | None = None
    status: int | None = None  # the exit status, one of `errors.Exit`


@contextmanager
def recorded(folder: Path, life: int, shard: Shard, step: Callable[[], int]) -> Iterator[None]:
    """Context manager: write down when and where this start begins to train, and how it ends; on all ranks.

    `step` gives the number of steps done. What cannot be written is not: it is no reason to end a run.
    """
    hosts = list(dict.fromkeys(gathered(socket.gethostname())))
    job = next((os.environ[name] for name in JOBS if os.environ.get(name, "none") != "none"), "")
    begun = {"started": time.time(), "first_step": step(), "ranks": shard.world_size, "hosts": hosts}
    path = folder / NAME if shard.is_main else None
    _append(path, {"life": life, **begun, "job": job, "madpo": version("madpo")})
    status = Exit.BUG
    try:
        yield
        status = Exit.DONE
    except StoppedError:
        status = Exit.AGAIN
        raise
    except UserError as error:
        status = error.status
        raise
    except Exception as error:
        status = Exit.LOST_PEER if is_lost_peer(error) else Exit.BUG
        raise
    finally:
        _append(path, {"life": life, "ended": time.time(), "last_step": step(), "status": int(status)})


def read(folder: Path) -> list[Life]:
    """The starts of a run, the first one first; lines that cannot be read are passed over."""
    found: dict[int, dict[str, Any]] = {}
    path = folder / NAME
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            found.setdefault(record["life"], {}).update(record)
    lives = []
    for record in found.values():
        with suppress(TypeError):
            life = Life(**record)
            numbers = life.started, life.first_step, life.ended or 0, life.last_step or 0, life.status or 0
            if all(isinstance(number, int | float) for number in numbers):
                lives.append(life)
    return lives


def effective_time(lives: Sequence[Life], lines: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """The seconds that went into steps which are kept, and those since the first start.

    `lines` are the training's lines of metrics.jsonl. None if there is nothing to tell from.
    """
    if not lives or not lines:
        return None
    steps = [0, *(line["step"] for line in lines)]
    kept = sum(
        (now - before) * line.get("perf/step_time", 0.0)
        for before, now, line in zip(steps, steps[1:], lines, strict=False)
    )
    last = max([line["time"] for line in lines] + [life.ended for life in lives if life.ended is not None])
    return kept, last - lives[0].started


def in_short(lives: Sequence[Life], is_training: bool) -> str:
    """How many starts there were, and how the last ones ended, as text for the user."""
    ends = {None: "cut off", Exit.DONE: "done", Exit.AGAIN: "stopped with a checkpoint"}
    shown = [ends.get(life.status, f"status {life.status}") for life in lives[-SHOWN:]]
    if is_training and lives[-1].status is None:
        shown[-1] = "running"
    return f"{len(lives)} ({'..., ' if len(lives) > SHOWN else ''}{', '.join(shown)})"


def _append(path: Path | None, record: Mapping[str, Any]) -> None:
    if path is not None:
        with suppress(OSError), path.open("a") as file:
            file.write(json.dumps(record) + "\n")
