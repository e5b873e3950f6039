"""Signals that stop a run: between steps in good order, at any other time at once.

SIGINT, SIGTERM, SIGUSR1 and SIGHUP all ask for the end. While steps are trained, the first one only sets a
flag, on which the ranks agree at the end of the step. A further SIGINT ends this process at once. Others mean
nothing, and neither does a SIGINT within AT_ONCE of the first signal: one wish may well come twice, to the
process group and from a launcher. At any other time a signal ends this process at once, with a line that says
where the run stands.

A thread waits for the signals, since the main thread may be inside a collective that never returns once
another rank has ended. This module imports nothing heavy.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
ENDING = (signal.SIGQUIT, signal.SIGUSR2)
"""Signals that end a command and its ranks at once, as Ctrl-\\ does. Ranks have no handler for them."""
AT_ONCE = 0.5
"""Seconds in which one wish to stop may come several times."""
_standing: list[Callable[[], str]] = [lambda: "stopped; the same command starts it again"]
_ending = threading.Event()
_steps = threading.Event()
_asked = 0
_asked_at = 0.0  # by the monotonic clock


class StoppedError(Exception):
    """The run was stopped in good order, with a checkpoint of its last step. Not a failure."""


@contextmanager
def stands(text: Callable[[], str]) -> Iterator[None]:
    """Context manager: a signal that comes while inside, and ends the process, is answered with this text."""
    _standing.append(text)
    try:
        yield
    finally:
        _standing.pop()


def standing() -> str:
    """What such a signal would be answered with now."""
    return _standing[-1]()


@contextmanager
def between_steps() -> Iterator[None]:
    """Context manager: while inside, the first signal does not end the process; see `asked`."""
    global _asked
    _asked = 0
    _steps.set()
    try:
        yield
    finally:
        _steps.clear()


def asked() -> int:
    """The number of the signal that asks this process to stop after the step; 0 if none has come."""
    return _asked


def watch(say: Callable[[str], None]) -> None:
    """From now on, signals stop this process. `say` is called with what is to be printed.

    The exit status of one that ends at once is 128 + n. A signal that this process was started to ignore,
    such as SIGHUP under nohup, stays ignored.
    """
    numbers = {number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # written to even while the main thread is not in Python
    for number in numbers:
        signal.signal(number, lambda *_: None)
    # A child that is ended before it has forgotten the pipe would end its parent: signals wait meanwhile.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, numbers),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers),
        after_in_child=lambda: _as_usual(numbers),
    )
    threading.Thread(target=_answer, args=(reader, numbers, say), daemon=True).start()


def is_ending(seconds: float) -> bool:
    """Whether a signal ends this process, or does within this time: it may reach other ranks earlier."""
    return _ending.wait(seconds)


def _answer(reader: int, numbers: set[signal.Signals], say: Callable[[str], None]) -> None:
    """Wait for signals; returns never."""
    global _asked, _asked_at
    while True:
        number = os.read(reader, 1)[0]
        if number not in numbers:
            continue
        if _steps.is_set() and not _asked:
            _asked, _asked_at = number, time.monotonic()
            say("stopping after this step; Ctrl-C again stops at once")
        elif not _asked or (number == signal.SIGINT and time.monotonic() - _asked_at > AT_ONCE):
            _end(number, say)


def _end(number: int, say: Callable[[str], None]) -> None:
    _ending.set()
    try:
        say(standing())
    finally:
        os._exit(128 + number)


def _as_usual(numbers: set[signal.Signals]) -> None:
    """Signals end a forked child, as a pool's workers must end; they are not passed on to its parent."""
    signal.set_wakeup_fd(-1)
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
