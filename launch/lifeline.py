"""No process outlives the command that it was started for. Without heavy imports."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading

LAUNCHER_PID = "MADPO_LAUNCHER_PID"


def die_with_launcher() -> None:
    """Terminate this process when what started it dies, which launchers do not see to themselves.

    The parent is watched by the kernel. `madpo train` stands further up, behind the deepspeed
    command, and leaves its process id in LAUNCHER_PID for a thread to wait on. Linux only.
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
        return  # a kernel before 5.3, or a sandbox: train on, with the parent watched only
    else:
        threading.Thread(target=_terminate_after, args=(launcher,), daemon=True).start()


def _terminate_after(pidfd: int) -> None:
    select.select([pidfd], [], [])
    os.kill(os.getpid(), signal.SIGTERM)
