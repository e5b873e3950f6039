"""Real signals to a process that waits outside Python, and to a child that it forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from madpo.trainer import stopping

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]

PROCESS = """
import ctypes, os, signal, sys
from madpo.trainer import stopping

stopping.watch(lambda text: print(f"{text}\\n", end="", flush=True))  # in one piece
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

STEPS = """
import ctypes, os, signal, sys, time
from madpo.trainer import stopping

stopping.watch(lambda text: print(f"{{text}}\\n", end="", flush=True))  # in one piece
with stopping.stands(lambda: "at step 3"):
    with stopping.between_steps():
        print(stopping.asked(), flush=True)
        while not stopping.asked():
            time.sleep(0.01)
        print(f"asked {{stopping.asked()}}", flush=True)
        {inside}
    print("saved", flush=True)
    time.sleep({after})
"""


@contextmanager
def started(script: str, ignored: int | None = None) -> Iterator[subprocess.Popen[str]]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def before() -> None:
        for number in (signal.SIGHUP, signal.SIGINT):  # which a shell around the tests may have ignored
            signal.signal(number, signal.SIG_DFL)
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)

    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, preexec_fn=before) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("number", ALL)
def test_a_signal_is_answered_although_the_main_thread_never_returns(number):
    with started(PROCESS) as process:
        assert line(process) == f"-{signal.SIGTERM:d}\n"
        assert process.poll() is None
        process.send_signal(number)
        output, _ = process.communicate()
        assert (output, process.returncode) == ("at step 3\n", 128 + number)


@pytest.mark.parametrize("number", ALL)
def test_between_steps_the_first_signal_only_asks(number):
    with started(STEPS.format(inside="", after=0)) as process:
        assert line(process) == "0\n"
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.returncode == 0
        assert sorted(output.splitlines()) == sorted(
            [
                "stopping after this step; Ctrl-C again stops at once",
                f"asked {number:d}",
                "saved",
            ]
        )


def test_a_second_sigterm_means_nothing_and_a_second_sigint_ends_at_once():
    with started(STEPS.format(inside="while True: ctypes.CDLL(None).sleep(100)", after=0)) as process:
        assert line(process) == "0\n"
        process.send_signal(signal.SIGTERM)
        seen = {line(process), line(process)}
        assert "asked 15\n" in seen and len(seen) == 2
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGINT)  # the wish that SIGTERM was, from somebody else
        time.sleep(stopping.AT_ONCE + 0.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
        assert (output, process.returncode) == ("at step 3\n", 128 + signal.SIGINT)


def test_after_the_steps_a_signal_ends_the_process_again():
    with started(STEPS.format(inside="", after=100)) as process:
        line(process)
        process.send_signal(signal.SIGUSR1)
        while line(process) != "saved\n":
            pass
        time.sleep(stopping.AT_ONCE + 0.1)
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode == 128 + signal.SIGINT


def test_what_a_process_was_started_to_ignore_stays_ignored():
    """SIGHUP under nohup."""
    with started(STEPS.format(inside="", after=0), ignored=signal.SIGHUP) as process:
        assert line(process) == "0\n"
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert "asked 15" in process.communicate()[0]
