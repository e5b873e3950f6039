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
from typing import TYPE_CHECKING

from madpo.launch import console_log
from madpo.launch.lifeline import die_with_launcher, end
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

FIRST_ERROR = "MADPO_FIRST_ERROR"
"""Environment variable with a path: the first rank that fails makes this file, and shows its error."""


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
    stopping.watch(_say_where_it_stands)
    rank, folder = int(os.environ.get("RANK", "0")), None
    try:
        config = _load(args)
        folder = Path(config.output_dir)
        command = shlex.join(["madpo", args.task, args.config, *map(masked_override, args.overrides)])
        if rank == 0:
            console_log.keep(folder, command)
            outcome.remove(folder)
            heartbeat.forget(folder)
        _run(config, args, command)
        status, text = Exit.DONE, ""
    except stopping.StoppedError as stopped:
        status, text = Exit.AGAIN, str(stopped)
    except Exception as error:
        if stopping.is_ending(seconds=1):  # the signal ended another rank first, and so broke a collective
            threading.Event().wait()
        status, text = _explained(error, rank, folder)
    if status in (Exit.DONE, Exit.AGAIN):  # which has been said
        if rank == 0 and folder is not None:
            outcome.write(folder, status, text, args.task)
        return status
    is_shown = _shows_its_error()
    if is_shown:
        print(text, file=sys.stderr, flush=True)
        if folder is not None:
            outcome.write(folder, status, text, args.task)
    if folder is not None and not (is_shown and rank == 0):  # what rank 0 prints is kept already
        with suppress(OSError):
            console_log.append(folder, f"rank {rank}: {text}")
    return status


def _explained(error: Exception, rank: int, folder: Path | None) -> tuple[Exit, str]:
    """The exit status for an error, and what to print."""
    if isinstance(error, UserError):
        return error.status, f"error: {error}"
    from madpo.trainer.dist import is_lost_peer

    if is_lost_peer(error):
        missing = missing_ranks(folder, rank) if folder is not None else ""
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
        from madpo.trainer import dist
        from madpo.trainer.config.deepspeed import check_machine
        from madpo.trainer.config.schema import load

        import_module(_module(args.task))
    config = load(args.config, args.overrides, args.task)
    dist.check_launcher()
    check_machine(config.deepspeed)
    die_with_launcher()
    return config


def _module(task: str) -> str:
    return f"madpo.trainer.stages.{TASKS[task][0]}"


def _run(config: Config, args: argparse.Namespace, command: str) -> None:
    from madpo.trainer import disk_faults, dist, out_of_memory

    module, function = TASKS[args.task]
    run = getattr(import_module(_module(args.task)), function)
    options = {"train": {"command": command, "extend": args.extend}, "evaluate": {"base": args.base}}
    rank, folder = int(os.environ.get("RANK", "0")), Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    beat = heartbeat.Heartbeat(folder, rank, config.launch.timeout_minutes)
    with beat, out_of_memory.explained(config, args.task), disk_faults.explained(config):
        run(config, **options.get(module, {}))
    dist.leave()


def _say_where_it_stands(text: str) -> None:
    """Print on rank 0 that a signal stops it, unless it does so because another rank has failed."""
    if os.environ.get("RANK", "0") == "0" and not os.path.exists(os.environ.get(FIRST_ERROR, "")):
        print(f"{text}\n", end="", flush=True)  # in one piece: the main thread may print at this moment


def _shows_its_error() -> bool:
    """Whether this rank's error is for the console: only that of the first rank that fails is.

    Under launchers that do not say who is first: a node's first rank shows its own, and another one after
    some time, in which the launcher ends it if it is not the only one.
    """
    path = os.environ.get(FIRST_ERROR)
    if path is None:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(5)
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    end(main())
