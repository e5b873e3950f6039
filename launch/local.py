"""Start the ranks of this machine, end them when we end, and say how they have ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from madpo.launch.environment import with_places
from madpo.launch.lifeline import LAUNCHER_PID
from madpo.launch.outer_launcher import check_alone, without_launcher
from madpo.trainer import outcome
from madpo.trainer.config.schema import Config, LaunchConfig
from madpo.trainer.counted import counted
from madpo.trainer.errors import Exit, UserError
from madpo.trainer.files import make_folder
from madpo.trainer.stopping import AT_ONCE, ENDING, SIGNALS

Task = Literal["train", "sft", "reward", "evaluate", "export", "probe", "annotate", "generate"]

SECONDS_AFTER_A_FAILURE = 20.0
"""How long the other ranks may take to notice that one has failed, before they are killed."""


def count_processes(launch: LaunchConfig) -> int:
    """The number of ranks to start on this machine. Raises UserError for more ranks than GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    if launch.num_processes == "auto":
        return gpus or min(2, os.cpu_count() or 1)
    if gpus and launch.num_processes > gpus:
        raise UserError(
            f"launch.num_processes: {launch.num_processes} ranks need as many GPUs, this machine has {gpus}"
        )
    return launch.num_processes


def command_line(task: Task, config: str, overrides: Sequence[str], flags: Sequence[str] = ()) -> list[str]:
    """The command that runs one rank of a task."""
    return [sys.executable, "-m", "madpo.launch.worker", "--task", task, *flags, config, *overrides]


def environment(ranks: int, port: int) -> dict[str, str]:
    """The environment that all ranks share: they meet at this port, and divide this machine's cores."""
    from madpo.launch.quiet import quiet_environment

    quiet_environment()
    env = without_launcher(os.environ) | {LAUNCHER_PID: str(os.getpid())}
    env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if any(name == "lo" for _, name in socket.if_nameindex()):
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # where gloo listens, too
    return with_places(env, ranks)


def run(
    task: Task, config: str, overrides: Sequence[str], resolved: Config, flags: Sequence[str] = ()
) -> int:
    """Start the ranks, pass signals on to them, wait, and return the exit status of the whole.

    `flags` are options of the worker. What counts is the outcome that the ranks write into the run folder:
    without one this is no success. Raises UserError if a launcher has started this command several times.
    """
    check_alone()
    folder_of_run = make_folder("output_dir", Path(resolved.output_dir))
    import torch

    from madpo.trainer.dist import held_port

    ranks = count_processes(resolved.launch)
    place = counted(ranks, "GPU") if torch.cuda.is_available() else "the CPU"
    print(f"starting {counted(ranks, 'rank')} on {place}", flush=True)
    start = outcome.new_start()
    command = command_line(task, config, overrides, flags)
    with held_port() as port:
        shared = environment(ranks, port) | {outcome.START: start}
        processes = []
        with _passed_on(processes) as received:
            for rank in range(ranks):
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # In sessions of their own: a terminal's Ctrl-C reaches them through us, once.
                processes.append(subprocess.Popen(command, env=own, start_new_session=True))
                if received:  # meanwhile
                    _signal(processes[-1], received[-1], is_second=False)
            ended = _wait(processes)
    return _status(processes, folder_of_run, start, received, ended)


@contextmanager
def _passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Context manager: signals are passed on to the processes, and noted in the list that it yields.

    The first as SIGTERM, as SIGINT has a traceback from a Python that has no handler of ours yet; a second
    SIGINT as it is, which ends a rank at once, and no sooner than ranks take it for a second one. One that is
    to end all at once kills them, with what they have started, also those that are frozen.
    """
    received: list[int] = []
    began = 0.0

    def pass_on(number: int, _frame: object) -> None:
        nonlocal began
        received.append(number)
        is_second = number == signal.SIGINT and len(received) > 1
        if len(received) == 1:
            began = time.monotonic()
        elif is_second:
            time.sleep(max(0.0, began + 1.2 * AT_ONCE - time.monotonic()))
        for process in processes:
            _signal(process, number, is_second)

    caught = [number for number in (*SIGNALS, *ENDING) if signal.getsignal(number) is not signal.SIG_IGN]
    old = {number: signal.signal(number, pass_on) for number in caught}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for process in processes:  # some are left only after an error of ours
            if process.poll() is None:
                process.kill()
                process.wait()


def _signal(process: subprocess.Popen[bytes], number: int, is_second: bool) -> None:
    if process.poll() is not None:
        return
    if number in ENDING:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.send_signal(signal.SIGINT if is_second else signal.SIGTERM)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> set[int]:
    """Wait for all processes. Once one has failed, kill those that do not end by themselves: these ranks."""
    killed_at, ended = None, set[int]()
    while None in (codes := [process.poll() for process in processes]):  # of all: the first may be frozen
        if killed_at is None and any(codes):
            killed_at = time.monotonic() + SECONDS_AFTER_A_FAILURE
        if killed_at is not None and time.monotonic() > killed_at:
            for rank, process in enumerate(processes):
                if process.poll() is None:
                    ended.add(rank)
                    process.kill()
        time.sleep(0.05)
    return ended


def _status(
    processes: Sequence[subprocess.Popen[bytes]],
    folder: Path,
    start: str,
    received: Sequence[int],
    ended: Set[int] = frozenset(),
) -> int:
    """The exit status of the whole; says what no rank could say. `ended` are ranks that we have killed."""
    codes = {rank: process.returncode for rank, process in enumerate(processes)}
    killed = {rank: -code for rank, code in codes.items() if code < 0 and rank not in ended}
    said = outcome.read(folder)
    if said is not None and said.start == start and said.status in (Exit.DONE, Exit.AGAIN):
        return said.status
    if ending := [number for number in received if number in ENDING]:
        print(
            f"ended at once by {_name(ending[0])}; the same command starts again", file=sys.stderr, flush=True
        )
        return 128 + ending[0]
    if received:
        return 128 + received[0]
    for rank, number in killed.items():
        hint = "; often the kernel, out of memory (see dmesg)" if number == signal.SIGKILL else ""
        print(
            f"error: rank {rank} on {socket.gethostname()} is gone: killed by {_name(number)}{hint}",
            file=sys.stderr,
            flush=True,
        )
    if killed:
        return Exit.LOST_PEER
    failed = [code for rank, code in codes.items() if code and rank not in ended]
    if said is not None and said.start == start:
        return said.status
    if not failed:
        print("error: the ranks ended without saying how", file=sys.stderr, flush=True)
    causes = [status for status in failed if status != Exit.LOST_PEER]  # of which the others have died
    return next(iter(causes + failed), Exit.BUG)


def _name(number: int) -> str:
    return signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"
