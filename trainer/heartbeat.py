"""A file per rank that says where the rank is: `.ranks/rank-00003.json` in the run folder.

A thread writes it every few seconds. So a rank that is frozen or gone falls silent, and one that waits for
others is seen to wait; that is how a hang gets a name. A rank that has stayed in one place for most of the
time that collectives may take also leaves the stacks of its threads in `hangs/`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER, STACKS = ".ranks", "hangs"
SECONDS = 10.0
"""Between two writes."""
SHARE_OF_TIMEOUT = 0.8
"""A rank that stays in one place for so much of the timeout leaves its stacks."""


@dataclass(frozen=True)
class Beat:
    """What a rank has said of itself last."""

    rank: int
    host: str
    process: int
    place: str  # as in "step 7" or "evaluation"
    seconds: float  # how long it had been there
    time: float  # seconds since 1970
    every: float  # seconds between two writes

    @property
    def silent_for(self) -> float:
        """Seconds since the rank wrote; 0 unless it has missed two writes."""
        seconds = time.time() - self.time
        return seconds if seconds > 3 * self.every else 0.0

    @property
    def who(self) -> str:
        """The rank and its process, as text for the user."""
        return f"rank {self.rank} ({self.host}, process {self.process})"

    @property
    def is_gone(self) -> bool:
        """Whether its process has ended; known for this machine only."""
        return self.host == socket.gethostname() and not Path(f"/proc/{self.process}").exists()


_current: Heartbeat | None = None


def at(place: str) -> None:
    """Say where this rank is now; nobody hears it outside a Heartbeat."""
    if _current is not None:
        _current.at(place)


class Heartbeat:
    """Writes this rank's file while inside."""

    def __init__(self, folder: Path, rank: int, timeout_minutes: float) -> None:
        self._folder, self._rank = folder, rank
        self._timeout = timeout_minutes * 60
        self._interval = min(SECONDS, self._timeout / 10)
        self._place, self._since = "start", time.monotonic()
        self._stopped = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        global _current
        _current = self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        self._stopped = True
        self._woken.set()
        self._thread.join()

    def at(self, place: str) -> None:
        """Say where the rank is now. Another kind of place is written at once; a step after a step is not."""
        is_new = place.split()[0] != self._place.split()[0]
        self._place, self._since = place, time.monotonic()
        if is_new:
            self._woken.set()

    def _write_all(self) -> None:
        has_stacks = None
        while True:
            seconds = time.monotonic() - self._since
            with suppress(OSError):  # a full disk, say: the rank only falls silent
                self._write(seconds)
            if seconds > SHARE_OF_TIMEOUT * self._timeout and has_stacks != self._since:
                has_stacks = self._since
                with suppress(OSError):
                    self._write_stacks(seconds)
            self._woken.wait(self._interval)
            self._woken.clear()
            if self._stopped:
                return

    def _write(self, seconds: float) -> None:
        process = self._rank, socket.gethostname(), os.getpid()
        beat = Beat(*process, self._place, round(seconds, 1), time.time(), self._interval)
        path = self._folder / FOLDER / f"rank-{self._rank:05d}.json"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(beat)) + "\n")
        os.replace(partial, path)

    def _write_stacks(self, seconds: float) -> None:
        path = self._folder / STACKS / f"rank-{self._rank:05d}.txt"
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            file.write(f"rank {self._rank} has been in {self._place} for {seconds:.0f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def beats_in(folder: Path) -> list[Beat]:
    """What the ranks of the newest start have said, in their order."""
    found = []
    for path in sorted((folder / FOLDER).glob("rank-*.json")):
        with suppress(OSError, ValueError, TypeError):
            found.append(Beat(**json.loads(path.read_bytes())))
    return found


def forget(folder: Path) -> None:
    """Delete the files of an earlier start."""
    for path in [*(folder / FOLDER).glob("rank-*"), *(folder / STACKS).glob("rank-*.txt")]:
        with suppress(OSError):
            path.unlink()


def missing_ranks(folder: Path, rank: int) -> str:
    """Which other ranks are gone, or silent for longer than two writes, as text for the user; "" if none."""
    parts = []
    for beat in beats_in(folder):
        if beat.rank == rank:
            continue
        if beat.is_gone:
            parts.append(f"{beat.who} is gone, last in {beat.place}")
        elif beat.silent_for:
            parts.append(f"{beat.who} has been silent for {beat.silent_for:.0f} s, last in {beat.place}")
    return "; ".join(parts)
