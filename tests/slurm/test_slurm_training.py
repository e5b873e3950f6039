"""The real trainer as a job of slurm/train.sbatch: a rank on each of two nodes, without GPUs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from job_logs import ends
from real_runs import NOISE, RealRun, real_run
from slurm_cluster import SCRIPT, Cluster, Job, wait_until

from madpo.trainer import outcome
from madpo.trainer.checkpoints.folders import newest_checkpoint, step_of
from madpo.trainer.checkpoints.manifest import read
from madpo.trainer.errors import Exit
from madpo.trainer.files import Entry

pytestmark = [pytest.mark.launcher, pytest.mark.ranks, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 30


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_folder) -> RealRun:
    folder = tmp_path_factory.mktemp("slurm")
    return real_run(folder, tokenizer_folder, max_steps=STEPS, num_train_epochs=1e6, global_batch_size=4)


def submit(cluster: Cluster, run: RealRun, name: str, *overrides: str) -> tuple[Job, RealRun]:
    """A job that trains into a folder of this name."""
    folder = run.folder.parent / name
    variables = {
        "MADPO_PYTHON": sys.executable,
        "MADPO_RANKS_PER_NODE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "typings"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TORCH_EXTENSIONS_DIR": str(run.extensions),
    }
    command = ["--partition=cpu", "--nodes=2", str(SCRIPT), run.path, f"output_dir={folder}", *overrides]
    return cluster.submit(*command, folder=folder.parent, env=variables), run._replace(folder=folder)


def shards(run: RealRun) -> dict[str, Entry]:
    newest = newest_checkpoint(run.folder / "checkpoints")
    assert newest is not None and step_of(newest.name) == STEPS
    return dict(read(newest).files)


@pytest.fixture(scope="module")
def whole(cluster, run) -> tuple[Job, RealRun]:
    """A job that nothing disturbs."""
    job, whole = submit(cluster, run, "whole")
    job.wait(seconds=150)
    return job, whole


def test_a_job_trains_on_two_nodes(whole):
    job, run = whole
    text = job.text()
    assert ends(text) == ["0"] and job.fact("Restarts") == "0"
    assert "dpo on 2 ranks" in text and not [word for word in NOISE if word in text], text
    assert len(run.losses()) == STEPS


def test_a_run_that_was_warned_ends_with_the_bits_of_one_that_was_not(cluster, run, whole):
    job, stopped = submit(cluster, run, "stopped")
    wait_until(lambda: len(stopped.losses()) >= 3, 90, job.text)
    job.signal("USR1")
    text = job.wait(seconds=200)
    assert ends(text) == ["75 and is requeued", "0"] and job.fact("Restarts") == "1"
    assert text.count("stopped at step ") == text.count("resuming after step ") == 1
    said = outcome.read(stopped.folder)
    assert said is not None and said.status == Exit.DONE
    assert shards(stopped) == shards(whole[1])


def test_a_mistake_in_the_config_is_one_line(cluster, run):
    job, _ = submit(cluster, run, "bad", "optim.lr=fast")
    text = job.wait("FAILED")
    assert job.fact("ExitCode") == "2:0" and job.fact("Restarts") == "0"
    assert text.count("0: error: ") == 1 and "optim.lr" in text and len(text.splitlines()) < 10, text
