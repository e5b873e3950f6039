"""The real launchers: `madpo train`, deepspeed with a hostfile, torchrun."""

from __future__ import annotations

import json
import sys

import pytest
from real_runs import BIN, NOISE, RealRun, real_run

from madpo.trainer.dist import free_port

pytestmark = [pytest.mark.launcher, pytest.mark.ranks]


@pytest.fixture
def run(tmp_path, tokenizer_folder) -> RealRun:
    return real_run(tmp_path, tokenizer_folder)


def test_madpo_train_starts_two_ranks_and_reports(run):
    ((status, text),) = run.finish(run.start(str(BIN / "madpo"), "train", run.path))
    assert status == 0, text
    assert text.startswith(f"reading {run.path}\nstarting 2 ranks on the CPU\ndpo on 2 ranks")
    assert not [word for word in NOISE if word in text], text
    header, *lines = (run.folder / "log.txt").read_text().splitlines()
    assert f"  madpo train {run.path}  (madpo " in header
    assert len(lines) > 4 and "\n".join(lines) in text
    assert json.loads((run.folder / "run.json").read_text())["world_size"] == 2
    assert len(run.losses()) == 2
    assert (run.folder / "report.html").stat().st_size
    assert (run.folder / "model" / "model.safetensors").is_file()
    assert not run.survivors()


def test_torchrun_and_deepspeed_nodes_train_the_same(run, tmp_path):
    """Two `nodes` of one rank each by hostfile, and two ranks under torchrun: equal losses."""
    worker = ["-m", "madpo.launch.worker", run.path]
    port = str(free_port())
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port, *worker]
    ((status, text),) = run.finish(run.start(*torchrun, f"output_dir={tmp_path / 'a'}"))
    assert status == 0, text

    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    port = str(free_port())
    nodes = []
    for rank in ("0", "1"):
        command = [
            str(BIN / "deepspeed"),
            "--hostfile",
            str(hosts),
            "--no_ssh",
            "--node_rank",
            rank,
        ]
        command += ["--master_addr", "127.0.0.1", "--master_port", port]
        command += ["--module", "madpo.launch.worker", run.path, f"output_dir={tmp_path / 'b'}"]
        nodes.append(run.start(*command))
    for status, text in run.finish(*nodes):
        assert status == 0, text
    assert run.losses(tmp_path / "a") == run.losses(tmp_path / "b")
    assert not run.survivors()


def tasks(run: RealRun, *overrides: str) -> list[tuple[int, str]]:
    """How two tasks end that are started as Slurm's `srun` does, one on each of two hosts."""
    job = {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_LOCALID": "0"}
    worker = [sys.executable, "-m", "madpo.launch.worker", run.path]
    started = []
    for rank, override in enumerate(overrides):
        own = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**job, **own}.items():
                patch.setenv(name, value)
            started.append(run.start(*worker, override))
    return run.finish(*started)


def test_tasks_of_slurm_are_ranks(run):
    (status, first), (other, second) = tasks(run, "seed=3", "seed=3")
    assert (status, other) == (0, 0), first + second
    assert "dpo on 2 ranks" in first and second == ""
    assert len(run.losses()) == 2 and not run.survivors()


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.max_steps=few", "train.max_steps: expected a whole"),
        ("seed=4", "another config than on"),
    ],
)
def test_what_one_host_gets_wrong_ends_all_with_one_line_of_the_first(run, override, message):
    (status, first), (other, second) = tasks(run, "seed=3", override)
    assert (status, other) == (2, 2)
    (line,) = first.splitlines()
    assert line.startswith("error: ") and "(rank 1): " in line and message in line and second == ""
    assert not list(run.folder.glob("*"))


def test_a_mistake_is_told_once_for_all_ranks_of_torchrun(run):
    port = str(free_port())
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port]
    ((_, text),) = run.finish(run.start(*torchrun, "-m", "madpo.launch.worker", run.path, "optim.lr=fast"))
    assert text.count("optim.lr: expected") == 1
