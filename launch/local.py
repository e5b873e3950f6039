"""Start the ranks of this machine, with the `deepspeed` launcher if several, and stop them when we stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from madpo.launch.lifeline import LAUNCHER_PID
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


def visible_gpus() -> list[str]:
    """The numbers in CUDA_VISIBLE_DEVICES on a machine with GPUs, else [].

    Raises UserError for GPUs given by name, which the deepspeed launcher does not take.
    """
    import torch

    setting = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not setting or not torch.cuda.device_count():
        return []
    gpus = [gpu.strip() for gpu in setting.split(",")]
    if not all(gpu.isdigit() for gpu in gpus):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {setting}; the deepspeed launcher takes numbers only, use those, or "
            "start the ranks with torchrun"
        )
    return gpus


def command_line(task: Task, config: str, overrides: Sequence[str], ranks: int) -> list[str]:
    """The command that runs a task on `ranks` ranks of this machine; a single rank needs no launcher."""
    from madpo.trainer.dist import free_port

    worker = ["madpo.launch.worker", "--task", task, config, *overrides]
    if ranks == 1:
        return [sys.executable, "-m", *worker]
    devices = ["--num_accelerators", str(ranks)]
    if visible := visible_gpus():
        # Given a number, the launcher takes the first GPUs whatever CUDA_VISIBLE_DEVICES says.
        devices = ["--include", f"localhost:{','.join(visible[:ranks])}"]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", os.devnull),  # this machine only, even if the cluster has a default hostfile
        *devices,
        *("--master_port", str(free_port())),
        "--no_local_rank",
        *("--log_level", "error"),
        "--module",
        *worker,
    ]


def environment(ranks: int) -> dict[str, str]:
    """The environment of the ranks: this machine's cores are divided among them."""
    import torch

    from madpo.trainer.dist import free_port

    env = os.environ | {LAUNCHER_PID: str(os.getpid())}
    if ranks == 1:
        env |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    elif visible_gpus():
        del env["CUDA_VISIBLE_DEVICES"]  # the command line names them
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    # A build folder per Python environment: environments that share DeepSpeed's default rebuild it in turn.
    env.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def run(task: Task, config: str, overrides: Sequence[str], launch: LaunchConfig) -> int:
    """Start the ranks, pass signals on to them, wait, and return their exit status.

    The status is 128 + n after signal n.
    """
    ranks = count_processes(launch)
    process = subprocess.Popen(
        command_line(task, config, overrides, ranks), env=environment(ranks), start_new_session=True
    )

    def forward(number: int, _frame: object) -> None:
        os.killpg(process.pid, number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
        return status if status >= 0 else 128 - status
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
