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

from madpo.trainer.errors import UserError
from madpo.trainer.files import write_atomically

NAME = "outcome.json"
FAILED = ".failed-"
"""The first rank of a start that fails gives a file this name."""
UNFAILED = ".unfailed"
"""That file until then. It is made at the start, as a disk may be full when a rank fails."""
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
    """Forget how earlier starts have ended. Raises UserError if something else has the place of the file."""
    try:
        (folder / NAME).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder / NAME} cannot be replaced ({error.strerror}); move it away") from None
    for path in set(folder.glob(f"{FAILED}*")) - {_failed(folder)}:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        (folder / UNFAILED).touch()


def is_first_to_fail(folder: Path) -> bool:
    """Whether this is the first rank of its start that fails, on whatever host; asked once by each.

    Where that cannot be told, it is: an error is said rather twice than never.
    """
    with suppress(OSError):
        (folder / UNFAILED).rename(_failed(folder))
        return True
    try:
        os.close(os.open(_failed(folder), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:
        pass
    return True


def has_failed(folder: Path) -> bool:
    """Whether a rank of this start has failed."""
    return _failed(folder).exists()


def _failed(folder: Path) -> Path:
    return folder / f"{FAILED}{os.environ.get(START, '')}"


def read(folder: Path) -> Outcome | None:
    """How the newest start has ended; None if none has, or the file cannot be read."""
    try:
        return Outcome(**json.loads((folder / NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
