"""The entry point of one rank, under `deepspeed`, under `torchrun`, or alone.

deepspeed --hostfile hosts --module madpo.launch.worker CONFIG [section.key=value ...]
torchrun --nproc-per-node 8 -m madpo.launch.worker CONFIG [section.key=value ...]
"""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from madpo.launch import console_log
from madpo.launch.environment import join_launcher
from madpo.launch.lifeline import LAUNCHER_PID, die_with_launcher, end
from madpo.trainer import heartbeat, outcome, stopping
from madpo.trainer.config.strict_yaml import masked_override
from madpo.trainer.errors import Exit, UserError, on_one_line
from madpo.trainer.heartbeat import missing_ranks
from madpo.trainer.masking import masked_text

if TYPE_CHECKING:
    from madpo.trainer.config.schema import Config

TASKS = {
    "train": ("train", "run_training"),
    "sft": ("train", "run_training"),
    "reward": ("train", "run_training"),
    "evaluate": ("evaluate", "run_evaluation"),
    "export": ("export", "run_export"),
    "probe": ("probe", "run_probe"),
    "annotate": ("annotate", "run_annotation"),
    "generate": ("generate", "run_generation"),
}
"""Task -> a module of trainer/stages, and its function."""

SECONDS_TO_DIE = 2.0
"""A process whose connections are closed may take so long to be gone, as while it dumps its memory."""


def main(argv: list[str] | None = None) -> int:
    """Run one task on this rank; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m madpo.launch.worker")
    parser.add_argument("--task", choices=TASKS, default="train")
    parser.add_argument("--extend", action="store_true", help="continue a run to another length")
    parser.add_argument("--base", action="store_true", help="evaluate the model that training starts from")
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher, not used")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(argv)
    console_log.outlive_readers(_say_that_nobody_reads)
    stopping.watch(_say_where_it_stands)
    global _started
    try:
        join_launcher()
        die_with_launcher()
        _started = _start(args)
        _run(_started, args)
        status, text = Exit.DONE, ""
    except stopping.StoppedError as stopped:
        status, text = Exit.AGAIN, str(stopped)
    except Exception as error:
        if stopping.is_ending(seconds=1):  # the signal ended another rank first, and so broke a collective
            threading.Event().wait()
        return _failed(error, _started, args.task)
    if _rank() == 0 and _started is not None:
        outcome.write(_started.folder, status, text, args.task)
    return status


class Run(NamedTuple):
    """What a rank knows of its run after the handshake."""

    config: Config
    folder: Path
    command: str  # as a user would type it


_started: Run | None = None
"""The run of this process, for the signals that stop it."""


def _start(args: argparse.Namespace) -> Run:
    """Read the config, and find out with the other ranks whether all mean one run. Raises UserError."""
    try:
        config = _load(args)
    except UserError as error:
        config = error
    from madpo.trainer.handshake import shake_hands

    command = shlex.join(["madpo", args.task, args.config, *map(masked_override, args.overrides)])

    def prepare(config: Config) -> None:
        folder = _folder(config)
        console_log.keep(folder, command)
        outcome.remove(folder)
        heartbeat.forget(folder)

    name = os.environ.get(outcome.START) or outcome.new_start()
    is_chosen = LAUNCHER_PID in os.environ
    start = shake_hands(config, name, is_chosen, lambda text: _print_error(f"error: {text}"), prepare)
    assert not isinstance(config, UserError)  # which would have been raised
    os.environ[outcome.START] = start.name
    if _rank() == 0:
        for note in start.notes:
            print(note, flush=True)
    return Run(config, _folder(config), command)


def _folder(config: Config) -> Path:
    return Path(config.output_dir).expanduser()


def _failed(error: Exception, run: Run | None, task: str) -> int:
    """Say what has failed, once for all ranks, and return the exit status."""
    status, text = _explained(error, _rank(), run and run.folder)
    is_shown = _shows_its_error(error, run and run.folder)
    if is_shown:
        _print_error(text)
    if run is not None:
        if is_shown:
            outcome.write(run.folder, status, text, task)
        if not (is_shown and _rank() == 0):  # what rank 0 prints is kept already
            with suppress(OSError):
                console_log.append(run.folder, f"rank {_rank()}: {text}")
    return status


def _explained(error: Exception, rank: int, folder: Path | None) -> tuple[Exit, str]:
    """The exit status for an error, and what to print."""
    if isinstance(error, UserError):
        return error.status, f"error: {error}"
    from madpo.trainer.dist import is_lost_peer

    if is_lost_peer(error):
        until = time.monotonic() + SECONDS_TO_DIE
        while not (missing := missing_ranks(folder, rank) if folder is not None else ""):
            if folder is None or time.monotonic() > until:
                break
            time.sleep(0.1)
        return Exit.LOST_PEER, (f"error: rank {rank} has lost another rank: {missing or on_one_line(error)}")
    return Exit.BUG, masked_text("".join(traceback.format_exception(error)))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Hide what is created within from the garbage collector, for good.

    The libraries of a rank are a million objects that stay; every full collection would walk them all.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def _load(args: argparse.Namespace) -> Config:
    """Import what the task needs, and load its config."""
    with _uncollected():
        from madpo.launch.quiet import quiet_libraries

        quiet_libraries()
        from madpo.trainer.config.deepspeed import check_machine
        from madpo.trainer.config.schema import load

        import_module(_module(args.task))
    config = load(args.config, args.overrides, args.task)
    check_machine(config.deepspeed)
    return config


def _module(task: str) -> str:
    return f"madpo.trainer.stages.{TASKS[task][0]}"


def _run(run: Run, args: argparse.Namespace) -> None:
    from madpo.trainer import disk_faults, dist, out_of_memory

    module, function = TASKS[args.task]
    stage = getattr(import_module(_module(args.task)), function)
    options = {"train": {"command": run.command, "extend": args.extend}, "evaluate": {"base": args.base}}
    run.folder.mkdir(parents=True, exist_ok=True)
    beat = heartbeat.Heartbeat(run.folder, _rank(), run.config.launch.timeout_minutes)
    with beat, out_of_memory.explained(run.config, args.task), disk_faults.explained(run.config):
        stage(run.config, **options.get(module, {}))
    dist.leave()


def _say_where_it_stands(text: str) -> None:
    """Print on rank 0 that a signal stops it, unless it does so because another rank has failed."""
    if _rank() == 0 and not (_started is not None and outcome.has_failed(_started.folder)):
        print(f"{text}\n", end="", flush=True)  # in one piece: the main thread may print at this moment


def _say_that_nobody_reads(text: str) -> None:
    if _rank() == 0:
        _print_error(text)


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _shows_its_error(error: Exception, folder: Path | None) -> bool:
    """Whether this rank's error is for the console: only that of the first rank that fails is.

    Before the handshake no folder is known to be shared by the ranks: the first rank of each host speaks, of
    what rank 0 has not said for all.
    """
    if isinstance(error, UserError) and error.is_agreed:
        return False
    return os.environ.get("LOCAL_RANK", "0") == "0" if folder is None else outcome.is_first_to_fail(folder)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    end(main())
