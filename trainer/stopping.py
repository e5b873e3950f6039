"""SIGINT and SIGTERM end this process at once, with a line that says where the run stands.

A thread waits for the signal, since the main thread may be inside a collective that never returns once
another rank has ended. This module imports nothing heavy.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_standing: list[Callable[[], str]] = [lambda: "stopped; the same command starts it again"]
_begun = threading.Event()


@contextmanager
def stands(text: Callable[[], str]) -> Iterator[None]:
    """Context manager: a signal that comes while inside is answered with this text."""
    _standing.append(text)
    try:
        yield
    finally:
        _standing.pop()


def watch(say: Callable[[str], None]) -> None:
    """From now on, a signal has `say` called with where the run stands; the exit status is 128 + n."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)  # written to even while the main thread is not in Python
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    # A child that is ended before it has forgotten the pipe would end its parent: signals wait meanwhile.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
        after_in_child=_as_usual,
    )
    threading.Thread(target=_end, args=(reader, say), daemon=True).start()


def is_stopping(seconds: float) -> bool:
    """Whether a signal came, or comes within this time: it may reach other ranks earlier."""
    return _begun.wait(seconds)


def _end(reader: int, say: Callable[[str], None]) -> None:
    while (number := os.read(reader, 1)[0]) not in SIGNALS:
        pass
    _begun.set()
    try:
        say(_standing[-1]())
    finally:
        os._exit(128 + number)


def _as_usual() -> None:
    """Signals end a forked child, as a pool's workers must end; they are not passed on to its parent."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
