"""How a process ends: with the command that started it, and at its own end. Imports nothing heavy."""

from __future__ import annotations

import atexit
import ctypes
import os
import select
import signal
import sys
import threading
import time
from typing import NoReturn

LAUNCHER_PID = "MADPO_LAUNCHER_PID"

SECONDS_TO_SAVE = 120.0
"""How long a rank may go on after the end of its launcher: a step, and a checkpoint."""


def die_with_launcher(seconds_to_save: float = SECONDS_TO_SAVE) -> None:
    """Terminate this process when its parent or its `madpo` command dies; launchers do not see to that.

    The kernel watches the parent. `madpo` may be further up; it leaves its process id in LAUNCHER_PID, and a
    thread waits for its end. SIGTERM comes first, on which a run saves; a process that is still there after
    `seconds_to_save`, in a collective that never returns, say, is killed. Linux only.
    """
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if LAUNCHER_PID not in os.environ:
        return
    try:
        launcher = os.pidfd_open(int(os.environ[LAUNCHER_PID]))
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGTERM)
    except OSError:
        return  # a kernel before 5.3, or a sandbox: go on, with only the parent watched
    else:
        wait = threading.Thread(target=_terminate_after, args=(launcher, seconds_to_save), daemon=True)
        wait.start()


def _terminate_after(pidfd: int, seconds_to_save: float) -> None:
    select.select([pidfd], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(seconds_to_save)
    os.kill(os.getpid(), signal.SIGKILL)


def end(status: int) -> NoReturn:
    """End this process with the status, as soon as what Python does at its exit is done.

    The interpreter itself is not taken down: threads of a process group that still waits for other ranks
    would abort it, and turn the status of an error into that of SIGABRT.
    """
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(status)
