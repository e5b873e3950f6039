"""Start the ranks of this machine with the `deepspeed` launcher, and stop all of them with us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from madpo.trainer.config import LaunchConfig

Task = Literal["train", "evaluate", "export"]


def count_processes(launch: LaunchConfig) -> int:
    """How many ranks to start here. Raises ValueError for more ranks than GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    if launch.num_processes == "auto":
        return gpus or min(2, os.cpu_count() or 1)
    if gpus and launch.num_processes > gpus:
        raise ValueError(
            f"launch.num_processes: {launch.num_processes} ranks need as many GPUs, this machine has {gpus}"
        )
    return launch.num_processes


def command_line(task: Task, config: str, overrides: Sequence[str], ranks: int) -> list[str]:
    """The deepspeed command that runs a task on `ranks` ranks of this machine."""
    from madpo.trainer.dist import free_port

    return [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--num_accelerators", str(ranks)),
        *("--master_port", str(free_port())),
        "--no_local_rank",
        *("--log_level", "error"),
        *("--module", "madpo.launch.worker"),
        *("--task", task),
        config,
        *overrides,
    ]


def environment(ranks: int) -> dict[str, str]:
    """The environment of the ranks: cores shared out, and on a CPU DeepSpeed told so."""
    import torch

    from madpo.trainer.dist import LAUNCHER_PID

    env = os.environ | {LAUNCHER_PID: str(os.getpid())}
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    # One build folder per Python environment: DeepSpeed's shared default is rebuilt by each in turn.
    env.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
        # gloo in torch 2.13 warns at every collective about a rename that DeepSpeed has to follow.
        env.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    return env


def run(task: Task, config: str, overrides: Sequence[str], launch: LaunchConfig) -> int:
    """Start the ranks, wait for them, return their exit status; signals are passed on."""
    ranks = count_processes(launch)
    process = subprocess.Popen(
        command_line(task, config, overrides, ranks), env=environment(ranks), start_new_session=True
    )

    def forward(number: int, _frame: object) -> None:
        os.killpg(process.pid, number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
