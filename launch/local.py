"""Start the ranks of this machine, with DeepSpeed's launcher if several, and end them when we end."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from madpo.launch.lifeline import LAUNCHER_PID
from madpo.launch.outer_launcher import check_alone, without_launcher
from madpo.launch.worker import FIRST_ERROR
from madpo.trainer.config.schema import LaunchConfig
from madpo.trainer.errors import UserError

Task = Literal["train", "sft", "reward", "evaluate", "export", "probe", "annotate", "generate"]


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


def devices(ranks: int) -> list[str]:
    """The devices of the ranks, as CUDA_VISIBLE_DEVICES names them where it does."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or not torch.cuda.device_count():
        return [str(number) for number in range(ranks)]
    return [name.strip() for name in visible.split(",")][:ranks]


def command_line(
    task: Task, config: str, overrides: Sequence[str], ranks: int, flags: Sequence[str] = ()
) -> list[str]:
    """The command that runs a task on `ranks` ranks of this machine; a single rank needs no launcher."""
    from madpo.trainer.dist import free_port

    worker = ["madpo.launch.worker", "--task", task, *flags, config, *overrides]
    if ranks == 1:
        return [sys.executable, "-m", *worker]
    # What `deepspeed` starts on every node; it would only look for other nodes first, in a process more.
    nodes = json.dumps({"localhost": devices(ranks)})
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch"),
        *("--world_info", base64.urlsafe_b64encode(nodes.encode()).decode()),
        *("--master_port", str(free_port())),
        "--no_local_rank",
        *("--log_level", "critical"),  # that a rank has failed is said by the rank
        "--module",
        *worker,
    ]


def environment(ranks: int) -> dict[str, str]:
    """The environment of the ranks: this machine's cores are divided among them."""
    from madpo.launch.quiet import quiet_environment
    from madpo.trainer.dist import free_port

    quiet_environment()
    env = without_launcher(os.environ) | {LAUNCHER_PID: str(os.getpid())}
    if ranks == 1:
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # A build folder per Python environment: environments that share DeepSpeed's default rebuild it in turn.
    env.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    return env


def run(
    task: Task, config: str, overrides: Sequence[str], launch: LaunchConfig, flags: Sequence[str] = ()
) -> int:
    """Start the ranks, end them when a signal comes, wait, and return their exit status.

    `flags` are options of the worker. The status is 128 + n after signal n. Raises UserError if a launcher
    has started this command several times.
    """
    check_alone()
    import torch

    ranks = count_processes(launch)
    plural = "" if ranks == 1 else "s"
    place = f"{ranks} GPU{plural}" if torch.cuda.is_available() else "the CPU"
    print(f"starting {ranks} rank{plural} on {place}", flush=True)
    received = 0
    with TemporaryDirectory(prefix="madpo-") as folder:
        process = subprocess.Popen(
            command_line(task, config, overrides, ranks, flags),
            env=environment(ranks) | {FIRST_ERROR: str(Path(folder) / "first")},
            start_new_session=True,
        )

        def end(number: int, _frame: object) -> None:
            nonlocal received
            received = number
            with suppress(ProcessLookupError):
                # SIGINT would have a traceback from each Python that has no handler of ours yet.
                os.killpg(process.pid, signal.SIGTERM)

        old = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = process.wait()
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
    if received and status:
        return 128 + received
    return status if status >= 0 else 128 - status
