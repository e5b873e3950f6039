"""A process and the launcher that it must not outlive: dead before it began, or dying later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from madpo.launch.lifeline import LAUNCHER_PID

CHILD = """
import sys, time
{before}
from madpo.launch.lifeline import die_with_launcher
die_with_launcher({grace})
print("alive", flush=True)
time.sleep({seconds})
print("done", flush=True)
"""


def start(
    launcher: str | None, seconds: float, before: str = "", grace: float = 100
) -> subprocess.Popen[str]:
    """A process with such a launcher, that lives so long if it is let, and dies `grace` after SIGTERM."""
    env = {name: value for name, value in os.environ.items() if name != LAUNCHER_PID}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({} if launcher is None else {LAUNCHER_PID: launcher})
    command = [sys.executable, "-c", CHILD.format(before=before, seconds=seconds, grace=grace)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def gone() -> str:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return str(process.pid)


def test_a_process_whose_launcher_is_dead_already_ends_at_once():
    process = start(gone(), 100)
    output, _ = process.communicate()
    assert (output, process.returncode) == ("", -signal.SIGTERM)


def test_a_process_ends_with_its_launcher():
    launcher = subprocess.Popen(["sleep", "100"])
    process = start(str(launcher.pid), 100)
    assert process.stdout is not None and process.stdout.readline() == "alive\n"
    assert process.poll() is None
    launcher.kill()
    launcher.wait()
    output, _ = process.communicate()
    assert (output, process.returncode) == ("", -signal.SIGTERM)


WITHOUT_WATCHING = {
    "no launcher": (None, ""),
    "an old kernel": (
        "1",
        "import os\ndef none(pid): raise OSError(38, 'Function not implemented')\nos.pidfd_open = none",
    ),
    "another system": (gone(), "sys.platform = 'darwin'"),
}


@pytest.mark.parametrize("case", WITHOUT_WATCHING)
def test_where_nothing_can_be_watched_the_process_goes_on(case):
    launcher, before = WITHOUT_WATCHING[case]
    output, _ = (process := start(launcher, 0, before)).communicate()
    assert (output, process.returncode) == ("alive\ndone\n", 0)


def test_one_that_does_not_end_by_itself_is_killed():
    launcher = subprocess.Popen(["sleep", "100"])
    ignoring = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)"
    process = start(str(launcher.pid), 100, ignoring, grace=0.2)
    assert process.stdout is not None and process.stdout.readline() == "alive\n"
    launcher.kill()
    launcher.wait()
    output, _ = process.communicate()
    assert (output, process.returncode) == ("", -signal.SIGKILL)


RANKS = """
import atexit, os, sys
from datetime import timedelta
import torch
from torch import distributed
from madpo.launch.lifeline import end
from madpo.trainer.dist import free_port

def rank(number, port):
    os.environ.update(RANK=str(number), WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", timeout=timedelta(minutes=1))
    for _ in range(50):  # of which some are not done yet when the rank ends
        distributed.all_reduce(torch.ones(1000), async_op=True)
    atexit.register(lambda: sys.stdout.write(f"{number} "))
    END(2)

port, children = free_port(), []
for number in range(4):
    if not (child := os.fork()):
        rank(number, port)
    children.append(child)
print("ends", [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_the_status_of_a_rank_is_its_own_while_its_collectives_are_not_done():
    """Without `end`, threads of gloo abort most of these ranks when the interpreter is taken down."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", RANKS.replace("END", "end")], env=env, capture_output=True, text=True
    )
    assert "ends [2, 2, 2, 2]" in done.stdout, done.stderr
    assert sorted(done.stdout.partition("ends")[0].split()) == ["0", "1", "2", "3"]
