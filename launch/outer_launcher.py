"""Launchers around the command: `madpo train` starts its ranks itself, so nobody else may start it twice."""

from __future__ import annotations

import os
from collections.abc import Mapping

from madpo.trainer.errors import UserError

COUNTS = (
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PET_NNODES", "NNODES", "NUM_NODES", "SLURM_NTASKS", "SLURM_NPROCS"),
    *("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_NRANKS"),
    *("JSM_NAMESPACE_SIZE", "FLUX_JOB_SIZE"),
)
"""Variables in which launchers say how many processes or nodes they start."""

NUMBERS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "PET_NODE_RANK", "SLURM_PROCID", "SLURM_NODEID"),
    *("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "PALS_RANKID"),
    *("JSM_NAMESPACE_RANK", "FLUX_TASK_RANK"),
)
"""Variables in which launchers say which of their processes or nodes this one is, from 0."""

PREFIXES = ("TORCHELASTIC_", "PET_", "GROUP_", "ROLE_")
NAMES = {"RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Variables of an outer launcher that would lead ranks of ours to its rendezvous."""


def check_alone() -> None:
    """Raise UserError if a launcher has started this command several times."""
    for names, least in ((COUNTS, 2), (NUMBERS, 1)):
        for name in names:
            value = os.environ.get(name, "")
            if value.isdecimal() and int(value) >= least:
                times = value if names is COUNTS else "several"
                raise UserError(
                    f"{name} is {value}: a launcher starts this command {times} times, and each would train "
                    "alone, as madpo starts its ranks itself. Let it start `python -m madpo.launch.worker "
                    "CONFIG` instead, as slurm/train.sbatch does (docs/clusters.md); if this "
                    f"is the only process, unset {name}"
                )


def without_launcher(variables: Mapping[str, str]) -> dict[str, str]:
    """Environment variables without those of an outer launcher."""
    return {
        name: value
        for name, value in variables.items()
        if name not in NAMES and not name.startswith(PREFIXES)
    }
