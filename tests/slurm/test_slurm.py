"""The life of a job of slurm/train.sbatch, on a real Slurm, with a stub in place of the worker."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from job_logs import ends, heads
from slurm_cluster import CPUS

pytestmark = pytest.mark.launcher


def ranks(folder: Path) -> list[list[str]]:
    """What each rank has found: ranks, GPUs, CPUs, address, port."""
    files = sorted((folder / "run").glob("rank-0-*"))
    return [file.read_text().split() for file in files]


def test_undisturbed(submit, cluster, tmp_path):
    job = submit("--nodes=2 --gpus-per-node=2", "short")
    text = job.wait()
    assert ends(text) == ["0"] and text.count("done") == 1 and len(text.splitlines()) == 7
    ((life, count, port),) = heads(text)
    assert (life, count) == ("0", "4") and 20000 <= int(port) < 30000
    assert ranks(tmp_path) == [["4", "0,1", str(CPUS // 2), cluster.gpu_nodes[0], port]] * 4
    assert job.fact("ExitCode") == "0:0" and job.fact("Restarts") == "0"


def test_a_warning_leaves_a_checkpoint_and_the_job_comes_back(submit, tmp_path):
    job = submit().wait_for("step 3")
    job.signal("USR1")
    job.wait_for("starts at", "1")
    job.signal("TERM")
    text = job.wait("FAILED")
    assert job.fact("Restarts") == "1" and job.fact("ExitCode") == "75:0"
    stopped, started = (re.findall(rf"{words} (\d+)\n", text) for words in ("stopped at step", "starts at"))
    assert started == ["0", stopped[0]] and stopped[1] == (tmp_path / "run" / "checkpoint").read_text()
    assert ends(text) == ["75 and is requeued", "75; ended from outside, and left so"]
    (first, second) = heads(text)
    assert first[0] == "0" and second[0] == "1" and first[2] != second[2]


def test_a_mistake_is_said_once_and_the_job_does_not_come_back(submit):
    job = submit("--nodes=2 --gpus-per-node=2", "bad")
    text = job.wait("FAILED")
    assert job.fact("ExitCode") == "2:0" and job.fact("Restarts") == "0"
    assert text.count("error: no such key") == 1 and len(text.splitlines()) < 10
    assert ends(text) == ["2 and is not requeued: another start would end so too"]


def test_without_gpus_the_ranks_are_counted_by_hand_or_refused(submit, tmp_path):
    job = submit("--partition=cpu --nodes=2", "short")
    text = job.wait("FAILED")
    assert job.fact("ExitCode") == "2:0" and job.fact("Restarts") == "0"
    assert text == (
        "error: the job has no GPUs; submit it with --gpus-per-node=N, or, to train on CPUs, with "
        "MADPO_RANKS_PER_NODE=N exported\n"
    )
    submit("--partition=cpu --nodes=2", "short", MADPO_RANKS_PER_NODE="3").wait()
    assert [found[:3] for found in ranks(tmp_path)] == [["6", "-", str(CPUS // 3)]] * 6
