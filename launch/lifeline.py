"""End a process when the command that started it ends. This module imports nothing heavy."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time

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
