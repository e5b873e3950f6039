"""The real launchers: deepspeed through `madpo train`, deepspeed with a hostfile, torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import make_config, save_model, write_pairs
from patience import patient

from madpo.trainer.config.schema import dump
from madpo.trainer.dist import free_port

pytestmark = [pytest.mark.launcher, pytest.mark.ranks]
BIN = Path(sys.executable).parent


@pytest.fixture
def run(tmp_path, tokenizer_folder) -> dict[str, Any]:
    model = save_model(tmp_path / "start", tokenizer_folder, seed=1)
    config = make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 12))},
            "train": {"max_steps": 2},
            "launch": {"num_processes": 2},
        },
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    return {"path": str(path), "folder": Path(config.output_dir), "extensions": tmp_path / "ext"}


def start(command: list[str], run: dict[str, Any]) -> subprocess.Popen[str]:
    env = os.environ | {
        "TORCH_EXTENSIONS_DIR": str(run["extensions"]),
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
        start_new_session=True,
    )


def finish(processes: list[subprocess.Popen[str]], run: dict[str, Any]) -> list[tuple[int, str]]:
    """Exit status and output of each; no process of this run is left behind, whatever happens."""
    try:
        outputs = [process.communicate(timeout=patient(150))[0] for process in processes]
        return [(p.returncode, text) for p, text in zip(processes, outputs, strict=True)]
    finally:
        for process in survivors(run):
            process.kill()


def survivors(run: dict[str, Any]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if run["path"] in (process.info["cmdline"] or []) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


NOISE = ("Warning", "WARNING", "[INFO]", "[ERROR]", "it/s]", "Traceback")
"""Words of what libraries print."""


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_madpo_train_starts_two_ranks_and_reports(run):
    ((status, text),) = finish([start([str(BIN / "madpo"), "train", run["path"]], run)], run)
    assert status == 0, text
    assert text.startswith(f"reading {run['path']}\nstarting 2 ranks on the CPU\ndpo on 2 ranks")
    assert not [word for word in NOISE if word in text], text
    header, *lines = (run["folder"] / "log.txt").read_text().splitlines()
    assert f"  madpo train {run['path']}  (madpo " in header
    assert len(lines) > 4 and "\n".join(lines) in text
    assert json.loads((run["folder"] / "run.json").read_text())["world_size"] == 2
    assert len(losses(run["folder"])) == 2
    assert (run["folder"] / "report.html").stat().st_size
    assert (run["folder"] / "model" / "model.safetensors").is_file()
    assert not survivors(run)


def test_torchrun_and_deepspeed_nodes_train_the_same(run, tmp_path):
    """Two `nodes` of one rank each by hostfile, and two ranks under torchrun: equal losses."""
    worker = ["-m", "madpo.launch.worker", run["path"]]
    port = str(free_port())
    torchrun = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", port, *worker]
    ((status, text),) = finish([start([*torchrun, f"output_dir={tmp_path / 'a'}"], run)], run)
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
        command += ["--module", "madpo.launch.worker", run["path"], f"output_dir={tmp_path / 'b'}"]
        nodes.append(start(command, run))
    for status, text in finish(nodes, run):
        assert status == 0, text
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert not survivors(run)


def test_a_mistake_that_only_a_rank_can_see_is_one_line(run):
    command = [str(BIN / "madpo"), "train", run["path"], "data.columns={prompt: nowhere}"]
    ((status, text),) = finish([start(command, run)], run)
    reading, starting, *lines = text.splitlines()
    assert status == 2 and reading.startswith("reading ") and starting.startswith("starting ")
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ") and "prompt: nowhere: no such column" in lines[0]
    assert lines[0].removeprefix("error: ") in (run["folder"] / "log.txt").read_text()
    assert not survivors(run)


STOPPED = r"stopped at step \d+ of 100000; the last checkpoint is of step \d+; the same command .*"


@pytest.mark.parametrize(
    "number",
    # Without a launcher, test_lifeline.py has the death of a parent by SIGKILL.
    [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_no_rank_outlives_its_launcher(run, number):
    process = start(
        [
            str(BIN / "madpo"),
            "train",
            run["path"],
            "train.max_steps=100000",
            "train.num_train_epochs=1e6",
            "train.save_steps=1",
        ],
        run,
    )
    try:
        deadline = time.monotonic() + patient(90)
        while not (run["folder"] / "metrics.jsonl").is_file() or len(losses(run["folder"])) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        assert len(survivors(run)) >= 3
        process.send_signal(number)
        deadline = time.monotonic() + patient(60)
        while survivors(run) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not survivors(run)
    finally:
        ((status, text),) = finish([process], run)
    if number == signal.SIGTERM:
        assert status == 128 + number
        last = text.splitlines()[-1]
        assert re.fullmatch(STOPPED, last)
        assert (run["folder"] / "log.txt").read_text().splitlines()[-1] == last
        assert not [word for word in NOISE if word in text], text
