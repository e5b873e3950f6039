"""The command line: quick, clear about mistakes."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from absent import python_without
from commands import command
from patience import patient

from madpo.launch import local
from madpo.launch.local import command_line, count_processes, environment
from madpo.trainer.config.schema import LaunchConfig
from madpo.trainer.errors import UserError
from madpo.trainer.run_folder import set_aside

CONFIG = """
output_dir: OUT
model: {model_name_or_path: nowhere}
data: {dataset_name: nowhere.jsonl}
objective: {loss_type: dpo}
"""


ON_THE_HUB = ("model.model_name_or_path=some/model", "data.dataset_name=some/pairs")
"""Overrides for a config whose names are looked up only when ranks read them."""


def madpo(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "madpo.launch.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=patient(120), check=False)


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(CONFIG.replace("OUT", str(tmp_path / "run")))
    return file


def test_help_fits_a_screen_and_names_the_commands():
    done = madpo("--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) < 50
    for name in ("init", "train", "evaluate", "export", "config", "report", "demo", "bench", "generate"):
        assert name in done.stdout


QUICK = 450
"""Modules. Help needs some 320, most of them Python's own; torch alone brings 900."""


def test_help_answers_at_once_as_it_imports_next_to_nothing():
    code = (
        "import sys\n"
        "from madpo.launch.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'datasets', 'numpy', 'pydantic', 'matplotlib'}\n"
        "print('MODULES', len(sys.modules), sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    _, count, heavy = done.stdout.splitlines()[-1].split(maxsplit=2)
    assert heavy == "[]" and int(count) < QUICK


@pytest.mark.parametrize("name", ["train", "show-data", "evaluate", "annotate"])
def test_something_is_said_before_torch_is_imported(path, name):
    done = python_without(("torch",), "-m", "madpo.launch.cli", name, str(path))
    assert done.stdout == f"reading {path}\n"
    assert "No module named 'torch'" in done.stderr


def test_config_prints_what_a_run_would_use(path):
    status, out, _ = command("config", str(path), "objective.beta=0.05")
    assert status == 0
    assert "beta: 0.05" in out and "global_batch_size: 64" in out


MISTAKE = "optim.lrr: unknown key, did you mean 'lr'?"


@pytest.mark.parametrize("name", ["config", "train", "evaluate", "export"])
def test_a_mistake_ends_in_one_line_and_status_2(path, name):
    said = "" if name == "config" else f"reading {path}\n"
    assert command(name, str(path), "optim.lrr=1") == (
        2,
        said,
        f"error: {path} and the command line: {MISTAKE}\n",
    )


def test_a_mistake_is_one_line_of_the_process_too(path):
    done = madpo("train", str(path), "optim.lrr=1")
    assert (done.returncode, done.stdout) == (2, f"reading {path}\n")
    assert done.stderr.strip() == f"error: {path} and the command line: {MISTAKE}"


@pytest.mark.parametrize("name", ["evaluate", "export"])
def test_a_folder_without_a_run_is_refused_before_ranks_start(path, tmp_path, name):
    for what in ("is not there", "holds no checkpoint"):
        status, out, error = command(name, str(path), *ON_THE_HUB)
        assert (status, out) == (2, f"reading {path}\n")
        assert error.startswith(f"error: output_dir: {tmp_path / 'run'} {what}; train first")
        assert ("--base" in error) == (name == "evaluate")
        (tmp_path / "run").mkdir(exist_ok=True)


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert count_processes(LaunchConfig()) == 2
    with pytest.raises(ValueError, match="4 ranks need as many GPUs, this machine has 2"):
        count_processes(LaunchConfig(num_processes=4))


def test_a_rank_gets_the_overrides_as_they_are():
    line = command_line("evaluate", "c.yaml", ["objective={loss_type: dpo}"], ["--base"])
    assert line[1:] == [
        *("-m", "madpo.launch.worker", "--task", "evaluate", "--base"),
        *("c.yaml", "objective={loss_type: dpo}"),
    ]


def test_the_ranks_meet_on_this_machine_whatever_an_outer_launcher_says(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8a1f, GPU-07cc")
    env = environment(2, 29500)
    assert (env["WORLD_SIZE"], env["MASTER_ADDR"], env["MASTER_PORT"]) == ("2", "127.0.0.1", "29500")
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-8a1f, GPU-07cc"  # rank r takes the r-th


def test_fresh_sets_the_earlier_run_aside(tmp_path):
    for number in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").write_text(str(number))
        set_aside(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert [(tmp_path / f"run.old-{n}" / "metrics.jsonl").read_text() for n in (1, 2)] == ["1", "2"]
    set_aside(tmp_path / "never")


def test_an_earlier_run_that_cannot_be_moved_is_one_line(tmp_path):
    """Its name may have no letter more."""
    folder = tmp_path / ("r" * 255)
    folder.mkdir()
    with pytest.raises(UserError, match=r"^output_dir: \S+ cannot be moved to \S+ \(File name too long\)"):
        set_aside(folder)


@pytest.mark.parametrize("statuses, whole", [((6, 2), 2), ((3, 6), 3), ((6, 6), 6), ((1, 4), 1), ((0, 0), 1)])
def test_the_status_of_ranks_that_could_not_write_it_is_that_of_the_first_cause(tmp_path, statuses, whole):
    ranks = [subprocess.Popen(["sh", "-c", f"exit {status}"]) for status in statuses]
    for rank in ranks:
        rank.wait()
    assert local._status(ranks, tmp_path, "a start", []) == whole


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_hangs_is_killed_once_another_has_failed_and_not_told_of(
    tmp_path, capfd, monkeypatch, failing
):
    monkeypatch.setattr(local, "SECONDS_AFTER_A_FAILURE", 0.2)
    lines = ["exec sleep 60"] * 2
    lines[failing] = "kill -SEGV $$"
    ranks = [subprocess.Popen(["sh", "-c", line]) for line in lines]
    began = time.monotonic()
    ended = local._wait(ranks)
    assert time.monotonic() - began < 30
    assert ended == {1 - failing} and local._status(ranks, tmp_path, "a start", [], ended) == 6
    assert capfd.readouterr().err.splitlines() == [
        f"error: rank {failing} on {socket.gethostname()} is gone: killed by SIGSEGV"
    ]


def test_fresh_does_not_move_the_config_that_it_trains_with(path, tmp_path):
    (tmp_path / "run").mkdir()
    inside = path.rename(tmp_path / "run" / "config.yaml")
    status, _, error = command("train", str(inside), *ON_THE_HUB, "--fresh")
    assert status == 2 and error.startswith(f"error: --fresh: {inside} would move with")
    assert inside.is_file()
