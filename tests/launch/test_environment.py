"""Whoever starts a rank, it finds torch's variables in its environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from madpo.launch import environment
from madpo.launch.environment import join_launcher, of_slurm, tasks_of_nodes, with_places
from madpo.trainer.errors import UserError

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "node1",
}
OURS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"),
    *("TRANSFORMERS_OFFLINE", "OMPI_COMM_WORLD_SIZE", "SLURM_CPUS_PER_TASK", *SLURM),
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """None of these variables, before and after."""
    for name in OURS:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def started(monkeypatch, variables: dict[str, str]) -> dict[str, str]:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    join_launcher()
    return {name: os.environ[name] for name in OURS if name in os.environ}


def test_a_task_of_slurm_is_a_rank(monkeypatch):
    found = started(monkeypatch, SLURM)
    assert [found[name] for name in OURS[:4]] == ["4", "0", "6", "2"]
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("node1", "20077")


@pytest.mark.parametrize(
    "more, name, value",
    [
        ({"MASTER_ADDR": "10.0.0.1"}, "MASTER_ADDR", "10.0.0.1"),
        ({"MASTER_PORT": "12345"}, "MASTER_PORT", "12345"),
        ({"SLURM_CPUS_PER_TASK": "12"}, "OMP_NUM_THREADS", "12"),
        ({"SLURM_CPUS_PER_TASK": "12", "OMP_NUM_THREADS": "3"}, "OMP_NUM_THREADS", "3"),
    ],
)
def test_what_the_job_says_itself_stays(more, name, value):
    assert ({**SLURM, **more} | of_slurm({**SLURM, **more}))[name] == value


def test_each_start_of_a_job_and_each_of_its_steps_has_a_port_of_its_own():
    starts = [(job, step, life) for job in (1, 2, 9_999_999) for step in (0, 1) for life in range(5)]
    ports = set()
    for job, step, life in starts:
        numbers = {"SLURM_JOB_ID": f"{job}", "SLURM_STEP_ID": f"{step}", "SLURM_RESTART_COUNT": f"{life}"}
        ports.add(int(of_slurm(SLURM | numbers)["MASTER_PORT"]))
    assert len(ports) == len(starts) and all(20000 <= port < 30000 for port in ports)


@pytest.mark.parametrize(
    "text, tasks", [("2(x3)", [2, 2, 2]), ("8", [8]), ("2(x2),1", [2, 2, 1]), ("1,4(x2)", [1, 4, 4])]
)
def test_tasks_of_nodes_in_short(text, tasks):
    assert tasks_of_nodes(text) == tasks


def test_the_first_host_of_a_list_is_slurms_to_find(monkeypatch, tmp_path):
    nodes = SLURM | {"SLURM_STEP_NODELIST": "gpu[03-07,12]"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no scontrol here to read gpu\[03-07,12\]"):
        of_slurm(nodes)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!{sys.executable}\nimport sys\nprint(*sys.argv[1:], sep="-")\nprint("gpu04")\n')
    scontrol.chmod(0o755)
    assert of_slurm(nodes)["MASTER_ADDR"] == "show-hostnames-gpu[03-07,12]"


def test_a_script_of_a_job_is_no_rank(monkeypatch):
    """In the script Slurm says how many tasks the job has, and none of them runs yet."""
    found = started(monkeypatch, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"})
    assert not {"RANK", "MASTER_ADDR", "OMP_NUM_THREADS"} & found.keys()


def test_the_numbers_of_a_launcher_inside_a_task_of_slurm_count(monkeypatch):
    torchrun = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    found = started(monkeypatch, SLURM | torchrun)
    assert {name: found[name] for name in torchrun} == torchrun


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "every process would train alone"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is not"),
    ],
)
def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, variables, message):
    with pytest.raises(UserError, match=message):
        started(monkeypatch, variables)


def test_ranks_of_a_machine_divide_its_cores_and_share_its_folders(monkeypatch):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda _: range(12))
    assert with_places({}, 4)["OMP_NUM_THREADS"] == "3" and with_places({}, 16)["OMP_NUM_THREADS"] == "1"
    places = with_places({"OMP_NUM_THREADS": "5", "HF_HUB_OFFLINE": "1"}, 4)
    extensions = Path(places["TORCH_EXTENSIONS_DIR"])
    assert places["OMP_NUM_THREADS"] == "5" and extensions.parent == Path(sys.prefix)
    assert places["HF_DATASETS_OFFLINE"] == places["TRANSFORMERS_OFFLINE"] == "1"
