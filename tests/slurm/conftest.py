"""A private Slurm for the tests of this folder, and jobs whose ranks are stubs."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import SCRIPT, Cluster, Job, slurm_cluster, why_not

HERE = Path(__file__).parent
TWO_NODES = "--nodes=2 --gpus-per-node=2"
Submit = Callable[..., Job]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with two GPUs each, and two without."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture
def submit(cluster, tmp_path) -> Iterator[Submit]:
    """Submit the script with a stub as its worker: options of sbatch, words for the stub, variables."""
    worker = tmp_path / "packages" / "madpo" / "launch" / "worker.py"
    worker.parent.mkdir(parents=True)
    shutil.copy(HERE / "stub_worker.py", worker)
    stub = {"PYTHONPATH": str(tmp_path / "packages"), "MADPO_PYTHON": sys.executable}

    def submit(
        options: str = "--nodes=2 --gpus-per-node=2", *words: str, run: str = "run", **variables: str
    ) -> Job:
        command = [*shlex.split(options), str(SCRIPT), run, *words]
        return cluster.submit(*command, folder=tmp_path, env=stub | variables)

    yield submit
    cluster.cancel()
