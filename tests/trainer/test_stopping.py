"""Real signals to a process that waits outside Python, and to a child that it forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

PROCESS = """
import ctypes, os, signal, sys
from madpo.trainer import stopping

stopping.watch(lambda text: print(text, flush=True))
child = os.fork()
if child == 0:
    signal.pause()
os.kill(child, signal.SIGTERM)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
with stopping.stands(lambda: "no longer so"):
    pass
with stopping.stands(lambda: "at step 3"):
    print(status, flush=True)
    while True:
        ctypes.CDLL(None).sleep(100)  # as in a collective: no handler of Python's could run
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_although_the_main_thread_never_returns(number):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", PROCESS], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == f"-{signal.SIGTERM:d}\n"
    assert process.poll() is None
    process.send_signal(number)
    output, _ = process.communicate()
    assert (output, process.returncode) == ("at step 3\n", 128 + number)
