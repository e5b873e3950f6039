"""`madpo submit`: check a config where it is typed, and hand it to Slurm as a job of slurm/train.sbatch.

The job reads a copy of the resolved config, so that a file which is edited later changes nothing that waits
in the queue.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, NamedTuple

from madpo.launch.local import Task
from madpo.launch.preflight import TRAINING, check
from madpo.trainer.config.schema import Config, dump
from madpo.trainer.errors import Exit, UserError
from madpo.trainer.files import make_folder, read_object, write_atomically, write_object
from madpo.trainer.masking import secrets_in

SCRIPT = Path(__file__).resolve().parent.parent / "slurm" / "train.sbatch"
CONFIG, NOTE = "submitted.yaml", "submitted.json"
"""Files of the run folder: what the job reads, and what is known of the submission."""


class Place(NamedTuple):
    """Where a job is to run."""

    nodes: int
    gpus_per_node: int
    ranks_per_node: int | None  # on nodes without GPUs
    options: Sequence[str]  # of sbatch, as in partition=gpu

    @property
    def ranks(self) -> int:
        return self.nodes * (self.ranks_per_node or self.gpus_per_node)


def submit(config: Config, task: Task, place: Place, dry_run: bool) -> int:
    """Submit a job, or show what would be submitted; returns the exit status.

    Raises UserError for a config that could not begin, for secrets, for a folder whose job has not ended, and
    for what sbatch refuses.
    """
    if not place.ranks:
        raise UserError("--gpus-per-node: 0 GPUs; give --ranks-per-node=N to train on CPUs")
    check(config, task, elsewhere=True)
    if task in TRAINING and (text := config.train.idle(place.ranks)):
        raise UserError(text)
    _refuse_secrets(config)
    folder = Path(config.output_dir).expanduser().absolute()
    command = _command(folder, task, place)
    variables = {"MADPO_PYTHON": sys.executable}
    if place.ranks_per_node:
        variables["MADPO_RANKS_PER_NODE"] = str(place.ranks_per_node)
    if dry_run:
        print(f"script  {SCRIPT}")
        given = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
        print(f"command {given} {shlex.join(command)}")
        print(f"Slurm   {_asked(command, variables)}")
        return Exit.DONE
    _refuse_a_second(folder)
    make_folder("output_dir", folder)
    write_atomically(folder / CONFIG, dump(config))
    job = _sbatch(command, variables).partition(";")[0]  # the name of a cluster may follow
    write_object(folder / NOTE, {"job": job, "command": command, **_of_the_code()})
    print(f"job {job}: {task} on {place.nodes} x {place.ranks // place.nodes} ranks, log {_log(folder, job)}")
    print(f"madpo status {shlex.quote(str(folder))} shows it; scancel {job} ends it with a checkpoint")
    return Exit.DONE


def _command(folder: Path, task: Task, place: Place) -> list[str]:
    options = ["--parsable", "--job-name=madpo", f"--output={_log(folder, '%j', '%%')}"]
    options += [f"--nodes={place.nodes}"]
    options += [f"--gpus-per-node={place.gpus_per_node}"] if place.gpus_per_node else []
    options += [f"--{option.removeprefix('--')}" for option in place.options]
    return ["sbatch", *options, str(SCRIPT), "--task", task, str(folder / CONFIG)]


def _log(folder: Path, job: str, percent: str = "%") -> str:
    """The log of a job; `percent` is what Slurm reads as a percent sign in a path."""
    return f"{str(folder).replace('%', percent)}/madpo-{job}.out"


def _refuse_secrets(config: Config) -> None:
    if next(secrets_in(config.model_dump(mode="json")), None) is not None:
        raise UserError(
            "the config holds a secret (a key, a password), which the files of a job would keep; put it into "
            "an environment variable, which the job inherits, and name that, as in "
            "generate.judge.endpoint.api_key_env"
        )


def _refuse_a_second(folder: Path) -> None:
    """Raise UserError if the job that was submitted for this folder is still in the queue, or runs."""
    job = read_object(folder / NOTE).get("job")
    if job is None:
        return
    queue = _run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], {})
    if queue.returncode == 0 and queue.stdout.strip():
        raise UserError(
            f"{folder}: job {job} of this run is {queue.stdout.split()[0].lower()}; scancel {job} ends it, "
            "or give another output_dir"
        )


def _sbatch(command: Sequence[str], variables: dict[str, str]) -> str:
    done = _run(command, variables)
    if done.returncode:
        raise UserError(f"sbatch: {_said(done)}")
    return done.stdout.strip()


def _asked(command: Sequence[str], variables: dict[str, str]) -> str:
    """What Slurm says of the job, without running it."""
    try:
        done = _run([command[0], "--test-only", *command[1:]], variables)
    except UserError as error:
        return str(error)
    return _said(done)


def _said(done: subprocess.CompletedProcess[str]) -> str:
    """What sbatch printed, on one line and without its own name before it."""
    return " ".join((done.stderr or done.stdout).replace("sbatch: ", "").replace("error: ", "").split())


def _run(command: Sequence[str], variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        raise UserError(f"there is no {command[0]} on this machine; submit from a login node of the cluster")
    env = {**os.environ, **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def _of_the_code() -> dict[str, Any]:
    """What would be needed to start this run again elsewhere."""
    packages = {each.metadata["Name"]: each.version for each in distributions()}
    known = {"time": time.time(), "madpo": version("madpo"), "packages": dict(sorted(packages.items()))}
    if _git("ls-files", "--error-unmatch", SCRIPT.name):  # not a repository that only lies around it
        known |= {"commit": _git("rev-parse", "HEAD"), "diff": _git("diff", "HEAD")}
    return known


def _git(*words: str) -> str:
    """What git says in the folder of the script; nothing if there is no git, or it fails."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(SCRIPT.parent), *words]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
