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
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from madpo.launch.lifeline import die_with_launcher
from madpo.trainer.errors import EXIT_USAGE, UserError

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


def main(argv: list[str] | None = None) -> int:
    """Run one task on this rank; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m madpo.launch.worker")
    parser.add_argument("--task", choices=TASKS, default="train")
    parser.add_argument("--local_rank", type=int, help="passed by the deepspeed launcher, not used")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _run(args)
    except UserError as error:
        _show(error)
        return EXIT_USAGE
    return 0


def _show(error: UserError) -> None:
    """Print an error: once per node if all ranks have it, and also if only one rank does."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)  # if the node's first rank failed too, the launcher ends this process meanwhile
    rank = os.environ.get("RANK", "0")
    print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr, flush=True)


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


def _run(args: argparse.Namespace) -> None:
    module, function = TASKS[args.task]
    with _uncollected():
        import datasets
        from transformers.utils.logging import disable_progress_bar

        from madpo.trainer import dist
        from madpo.trainer.config.deepspeed import check_machine
        from madpo.trainer.config.schema import load

        run = getattr(import_module(f"madpo.trainer.stages.{module}"), function)
    # torch 2.13 warns at every collective about a renamed argument that DeepSpeed still uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    config = load(args.config, args.overrides, args.task)
    dist.check_launcher()
    check_machine(config.deepspeed)
    die_with_launcher()
    command = shlex.join(["madpo", args.task, args.config, *args.overrides])
    run(config, *([command] if module == "train" else []))
    dist.leave()


if __name__ == "__main__":
    sys.exit(main())
