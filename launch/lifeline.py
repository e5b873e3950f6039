"""End a process when the command that started it ends. This module imports nothing heavy."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading

LAUNCHER_PID = "MADPO_LAUNCHER_PID"


def die_with_launcher() -> None:
    """Terminate this process when its parent or its `madpo` command dies; launchers do not see to that.

    The kernel watches the parent. `madpo train` may be further up, above the deepspeed launcher; it leaves
    its process id in LAUNCHER_PID, and a thread waits for its end. Linux only.
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
        threading.Thread(target=_terminate_after, args=(launcher,), daemon=True).start()


def _terminate_after(pidfd: int) -> None:
    select.select([pidfd], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
