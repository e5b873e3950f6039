"""The real launchers: `madpo train`, deepspeed with a hostfile, torchrun."""

from __future__ import annotations

import json

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
