"""One contract of start: what launchers say of a rank, as the variables of torch, which all else reads.

torchrun and `deepspeed` set these variables themselves, on Kubernetes too (`PET_*`, which torchrun reads).
Under Slurm's `srun`, a task is a rank.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from madpo.launch.quiet import quiet_environment
from madpo.trainer.errors import UserError

SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
"""The number of tasks of a step. Slurm sets it for what `srun` starts, and not in the script of a job."""

OTHERS = "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_NRANKS"
"""Variables in which launchers of MPI say how many processes they start."""

PORTS = range(20000, 30000)
"""A job of Slurm takes one of these. Linux gives none of them to programs that ask for any port."""


def join_launcher() -> None:
    """Set what a rank needs in this process's environment, whoever has started it.

    A process that nobody has started as a rank keeps its environment. Raises UserError if there are several
    processes that do not know of each other.
    """
    quiet_environment()
    env = os.environ
    if "RANK" not in env:
        if int(env.get(SLURM_TASKS, "1")) > 1:
            env |= of_slurm(env)
        _check_alone(env)
    if int(env.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" not in env:
        raise UserError("WORLD_SIZE is set, MASTER_ADDR is not; start ranks with torchrun, deepspeed or srun")
    if "RANK" in env:
        env |= with_places(env, int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", "1"))))


def with_places(env: Mapping[str, str], local_ranks: int) -> dict[str, str]:
    """The environment with what all ranks of a machine share, where it does not say that: threads, folders,
    switches of libraries.

    The machine's cores are divided among its ranks. Each Python environment has a folder of its own for what
    DeepSpeed compiles: environments that share DeepSpeed's default build it anew in turn.
    """
    cores = len(os.sched_getaffinity(0)) // local_ranks
    places = {
        "OMP_NUM_THREADS": str(max(1, cores)),
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
    }
    if "HF_HUB_OFFLINE" in env:  # two libraries have switches of their own
        places |= dict.fromkeys(("HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), env["HF_HUB_OFFLINE"])
    return places | dict(env)


def of_slurm(env: Mapping[str, str]) -> dict[str, str]:
    """torch's variables of a task that `srun` has started, from Slurm's."""
    step, job = env.get("SLURM_STEP_ID", "0"), env.get("SLURM_JOB_ID", "0")
    life = env.get("SLURM_RESTART_COUNT", "0")
    node = int(env.get("SLURM_NODEID", "0"))
    found = {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env[SLURM_TASKS],
        "LOCAL_SIZE": str(tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))[node]),
    }
    if "SLURM_CPUS_PER_TASK" in env:
        found["OMP_NUM_THREADS"] = env.get("OMP_NUM_THREADS", env["SLURM_CPUS_PER_TASK"])
    if "MASTER_ADDR" not in env:
        found["MASTER_ADDR"] = _first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    if "MASTER_PORT" not in env:  # another one for each start, since a port may be held for a while
        start = int(job) + 1009 * int(step) + 101 * int(life)
        found["MASTER_PORT"] = str(PORTS[start % len(PORTS)])
    return found


def tasks_of_nodes(text: str) -> list[int]:
    """The number of tasks of each node, from Slurm's short form: "2(x3),1" is 2, 2, 2, 1."""
    out: list[int] = []
    for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        out += [int(tasks)] * int(times or 1)
    return out


def _first_host(nodes: str) -> str:
    """The first host of Slurm's list of nodes, such as "gpu[03-07,12]"."""
    if not re.search(r"[\[,]", nodes):
        return nodes
    if shutil.which("scontrol") is None:
        raise UserError(f"MASTER_ADDR is not set, and there is no scontrol here to read {nodes}; export it")
    command = ["scontrol", "show", "hostnames", nodes]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


def _check_alone(env: Mapping[str, str]) -> None:
    """Raise UserError if the environment says that there are other processes, and not which one this is."""
    for name in OTHERS:
        if "RANK" not in env and int(env.get(name, "1")) > 1:
            raise UserError(
                f"{name} is {env[name]} and RANK is not set: every process would train alone into the same "
                "folder; start ranks with torchrun, deepspeed or srun (docs/clusters.md)"
            )
