"""`madpo submit` on real daemons, with a stub as the worker of the job."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import command
from harness import make_config, save_model, write_pairs
from slurm_cluster import Job

from madpo.trainer.config.schema import dump, load

pytestmark = [pytest.mark.launcher, pytest.mark.ranks]
HERE = Path(__file__).parent
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Path:
    save_model(tmp_path / "model", tokenizer_folder, seed=1)
    write_pairs(tmp_path / "pairs.jsonl", 8)
    tree = {
        "model": {"model_name_or_path": str(tmp_path / "model")},
        "data": {"dataset_name": str(tmp_path / "pairs.jsonl"), "dataset_test_split": None},
        "train": {"global_batch_size": 4},
    }
    path = tmp_path / "c.yaml"
    path.write_text(dump(make_config(tmp_path, tree)))
    return path


@pytest.fixture
def run(cluster, config, tmp_path, monkeypatch):
    """Type `madpo submit` on the cluster; jobs run the stub."""
    worker = tmp_path / "packages" / "madpo" / "launch" / "worker.py"
    worker.parent.mkdir(parents=True)
    shutil.copy(HERE / "stub_worker.py", worker)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.env[name])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.chdir(tmp_path)

    def run(*words: str, stub: str = "short") -> tuple[int, str, str]:
        monkeypatch.setenv("STUB", stub)
        return command("submit", str(config), *words)

    yield run
    cluster.cancel()


def test_a_job_is_shown_and_nothing_is_written(run, config):
    where = ("--nodes=2", "--gpus-per-node=2", "-s", "time=10")
    status, out, _ = run(*where, "optim.lr=3e-6", "--dry-run")
    folder = Path(load(config).output_dir)
    assert status == 0 and not folder.exists()
    assert re.search(
        r"command MADPO_PYTHON=\S+ sbatch --parsable .*--nodes=2 --gpus-per-node=2 --time=10 ", out
    )
    assert re.search(r"Slurm   Job \d+ to start at .* using 16 processors on nodes", out), out
    refused = run("--nodes=9", "--gpus-per-node=2", "train.global_batch_size=99", "--dry-run")[1]
    assert "Slurm   allocation failure: Requested node configuration is not available" in refused


def test_a_job_has_the_config_of_its_submission(run, config, cluster, tmp_path):
    status, out, errors = run("--nodes=2", "--gpus-per-node=2", "optim.lr=3e-6", stub="")
    assert status == 0, errors
    number = out.partition("job ")[2].partition(":")[0]
    folder = Path(load(config).output_dir)
    job = Job(cluster, number, folder)
    job.wait_for("step 2")
    assert load(folder / "submitted.yaml").optim.lr == 3e-6
    note = json.loads((folder / "submitted.json").read_text())
    assert note["job"] == number and "torch" in note["packages"] and len(note.get("commit", "0" * 40)) == 40
    status, _, errors = run("--nodes=2", "--gpus-per-node=2")
    assert status == 2 and f"job {number} of this run is running; scancel {number} ends it" in errors
    (folder / "enough").touch()
    assert "4 ranks" in job.wait()
    assert run("--nodes=2", "--gpus-per-node=2")[0] == 0  # it continues a run that has ended


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--nodes=3", "--gpus-per-node=2"), "4 groups a step leave 2 of 6 ranks without work"),
        (("--gpus-per-node=0",), "0 GPUs; give --ranks-per-node=N"),
        (("--gpus-per-node=2", "deepspeed.comet.api_key=abcdefgh"), "the config holds a secret"),
        (("--gpus-per-node=2", "data.dataset_name=nowhere.jsonl"), "nowhere.jsonl: no such file"),
        (("--gpus-per-node=2", "-s", "partition=none"), "sbatch: invalid partition specified: none"),
    ],
)
def test_what_cannot_begin_is_refused_before_the_queue(run, config, words, says):
    status, _, errors = run(*words)
    assert status == 2 and says in errors and len(errors.strip().splitlines()) == 1
    assert not (Path(load(config).output_dir) / "submitted.json").exists()
