"""`outcome.json`: how the newest start in a run folder has ended, in the ranks' own words.

Launchers lose exit statuses: one turns a killed child into a success, another any status into 1. What counts
is what the ranks have written. This module imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from madpo.trainer.files import write_atomically

NAME = "outcome.json"
START = "MADPO_START"
"""Environment variable that all ranks of one start share: a name for the start."""


@dataclass(frozen=True)
class Outcome:
    """How a start has ended."""

    status: int  # the exit status, one of `errors.Exit`
    text: str  # what was said last; empty after success
    task: str
    start: str  # name of the start
    rank: int
    host: str
    time: float  # seconds since 1970


def new_start() -> str:
    """A name for a start, which no other one has."""
    return secrets.token_hex(8)


def write(folder: Path, status: int, text: str, task: str) -> None:
    """Write how this start has ended. What cannot be written is not: the exit status still says it."""
    rank = int(os.environ.get("RANK", "0"))
    start = os.environ.get(START, "")
    outcome = Outcome(int(status), text, task, start, rank, socket.gethostname(), time.time())
    with suppress(OSError):
        write_atomically(folder / NAME, json.dumps(asdict(outcome), indent=1) + "\n")


def remove(folder: Path) -> None:
    """Forget how an earlier start has ended."""
    with suppress(OSError):
        (folder / NAME).unlink(missing_ok=True)


def read(folder: Path) -> Outcome | None:
    """How the newest start has ended; None if none has, or the file cannot be read."""
    try:
        return Outcome(**json.loads((folder / NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
