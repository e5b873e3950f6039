"""Crashes, limits, cancelling, and what else happens to a job of slurm/train.sbatch; ranks are stubs."""

from __future__ import annotations

import sys

import pytest
from job_logs import ends, heads
from slurm_cluster import Job

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
SOON = "--wait=1"
"""Option of srun: after the end of one rank the others have a second, and not a minute."""


def test_after_a_crash_the_job_comes_back(submit, cluster, tmp_path):
    job = submit("--nodes=2 --gpus-per-node=2 --comment=mine", "crash-once", MADPO_SRUN_ARGS=SOON)
    job.wait_for("starts at", "1")
    (tmp_path / "run" / "enough").touch()
    assert ends(job.wait()) == ["137 and is requeued", "0"] and job.fact("Restarts") == "1"
    assert "Comment=mine; crashes in a row: 1" in cluster.ask("scontrol", "show", "job", job.number)


def test_crashes_end_after_so_many(submit):
    job = submit("--nodes=1 --gpus-per-node=1", "crash", MADPO_MAX_CRASHES="1")
    text = job.wait("FAILED")
    assert job.fact("Restarts") == "1" and job.fact("ExitCode") == "1:0"
    assert ends(text) == [
        "1 and is requeued",
        "1 and is not requeued: crashes in a row, MADPO_MAX_CRASHES=1",
    ]


def test_a_stop_with_a_checkpoint_ends_a_row_of_crashes(submit, cluster):
    """The comment is that of a job which has crashed before."""
    job = submit("--nodes=1 --gpus-per-node=1 --comment='mine; crashes in a row: 3'").wait_for("step 3")
    job.signal("USR1")
    job.wait_for("starts at", "1")
    assert "Comment=mine; crashes in a row: 0" in cluster.ask("scontrol", "show", "job", job.number)
    assert ends(job.text()) == ["75 and is requeued"]


def test_a_warning_before_the_first_step_is_no_crash(submit):
    job = submit("--nodes=1 --gpus-per-node=1", "loading", MADPO_MAX_CRASHES="0").wait_for("loads a model")
    job.signal("USR1")
    job.wait_for("loads a model", "1")
    assert ends(job.text()) == ["138 and is requeued"]


def test_lives_are_limited(submit):
    job = submit(MADPO_MAX_LIVES="0").wait_for("step 3")
    job.signal("USR1")
    assert ends(job.wait("FAILED")) == ["75 and is not requeued: MADPO_MAX_LIVES=0"]


def test_cancelling_is_final_and_leaves_a_checkpoint(submit, cluster, tmp_path):
    job = submit().wait_for("step 3")
    cluster.ask("scancel", job.number)
    text = job.wait("CANCELLED")
    assert f"stopped at step {(tmp_path / 'run' / 'checkpoint').read_text()}\n" in text
    assert ends(text) == ["75; ended from outside, and left so"] and job.fact("Restarts") == "0"
    assert not [p for p in cluster.processes() if "madpo.launch.worker" in p.cmdline()]


def test_a_node_that_crashes_brings_the_job_back(submit, cluster, tmp_path):
    job = submit().wait_for("step 7")
    node = cluster.gpu_nodes[1]
    cluster.crash(node)
    cluster.revive(node)
    job.wait_for("starts at", "1")
    (tmp_path / "run" / "enough").touch()
    text = job.wait()
    assert "DUE TO NODE FAILURE" in text and job.fact("Restarts") == "1"
    assert text.count("starts at") == 2 and text.count("starts at 0") == 1
    assert [head[0] for head in heads(text)] == ["0", "1"] and ends(text)[-1] == "0"


def test_the_interpreter_need_not_be_on_the_path(submit, tmp_path):
    """Neither an environment that is not active nor `--export` keeps a job from its interpreter."""
    plain = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": ""}
    job = submit("--nodes=2 --gpus-per-node=2", "short", **plain, MADPO_PYTHON="python")
    text = job.wait("FAILED")
    assert job.fact("ExitCode") == "2:0" and job.fact("Restarts") == "0"
    assert text.startswith("error: MADPO_PYTHON: python cannot import madpo (") and text.count("\n") == 1
    named = f"MADPO_PYTHON={sys.executable},PYTHONPATH={tmp_path / 'packages'}"
    job = submit(f"--nodes=2 --gpus-per-node=2 --export={named}", "short", **plain)
    assert ends(job.wait()) == ["0"]


def test_a_chain_goes_on_after_the_last_life_of_a_job(submit, cluster, tmp_path):
    first = submit().wait_for("step 3")
    second = submit(f"--nodes=2 --gpus-per-node=2 --dependency=afterok:{first.number}", "short")
    first.signal("USR1")
    first.wait_for("starts at", "1")
    assert second.fact("JobState") == "PENDING" and not second.text()
    (tmp_path / "run" / "enough").touch()
    assert ends(first.wait()) == ["75 and is requeued", "0"] and ends(second.wait()) == ["0"]


def test_each_task_of_an_array_has_its_own_arguments_and_lives(submit, cluster, tmp_path):
    array = submit("--array=1-2 --nodes=1 --gpus-per-node=2", run="run-%a")
    one, two = (Job(cluster, f"{array.number}_{task}", tmp_path) for task in (1, 2))
    one.wait_for("step 3")
    two.wait_for("step 3").signal("USR1")  # its number is that of the array, too
    two.wait_for("starts at", "1")
    for task in (1, 2):
        (tmp_path / f"run-{task}" / "enough").touch()
    assert [ends(job.wait()) for job in (one, two)] == [["0"], ["75 and is requeued", "0"]]


GPUS_ASKED_FOR = {
    "--nodes=2": 4,  # --exclusive of the script takes all of them
    "--nodes=2 --gres=gpu:2": 4,
    "--nodes=2 --gpus=4": 4,
    "--nodes=2 --gpus-per-node=1": 4,
    "--nodes=2 --gpus-per-node=1 --exclusive=user": 2,
    "--nodes=2 --ntasks-per-node=2 --gpus-per-task=1": 4,
    "--nodes=2 --gpus=3 --exclusive=user": 0,
}


@pytest.mark.parametrize(("options", "count"), GPUS_ASKED_FOR.items())
def test_all_gpus_of_the_allocation_are_used(submit, tmp_path, options, count):
    job = submit(options, "short")
    if count == 0:
        assert job.wait("FAILED") == (
            "error: the nodes have different numbers of GPUs: GRES=gpu:1, GRES=gpu:2; submit with "
            "--gpus-per-node=N\n"
        )
        return
    ((_, found, _),) = heads(job.wait())
    assert int(found) == len(list((tmp_path / "run").glob("rank-0-*"))) == count
