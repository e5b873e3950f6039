"""`madpo run`: run a recipe's stages in order, each as the command that a user would type.

A stage's folder holds `.started.json` and, after success, `.done.json`, both with the stage's key. A stage
that is done with an equal key is skipped; one that was interrupted with an equal key is continued; one with
another key is set aside and run again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from madpo.launch.lifeline import LAUNCHER_PID
from madpo.launch.recipes import call
from madpo.launch.recipes.keys import keys
from madpo.launch.recipes.read import CALL, Recipe, Stage, read
from madpo.trainer import user_function
from madpo.trainer.config import strict_yaml
from madpo.trainer.config.schema import from_tree
from madpo.trainer.contents import Contents, write_json
from madpo.trainer.errors import Exit, UserError
from madpo.trainer.files import write_private
from madpo.trainer.masking import masked
from madpo.trainer.run_folder import set_aside
from madpo.trainer.stopping import ENDING, SIGNALS

State = Literal["done", "interrupted", "changed", "new"]
HOUSEKEEPING = ".recipe"
LINES_OF_A_FAILURE = 20


@dataclass(frozen=True)
class Job:
    """A stage that is running."""

    stage: Stage
    process: subprocess.Popen[bytes]
    started: float


def run(path: Path, overrides: Sequence[str], jobs: int, only: Sequence[str], dry_run: bool) -> int:
    """Run a recipe's stages, `jobs` at a time; returns the exit status of the first that fails, or 0.

    Raises UserError for a mistake in the recipe or in the config of any stage, before the first starts,
    and if another `madpo run` is at work in the same folder.
    """
    whole = read(path, overrides)
    sources = {stage.name: checked(stage, whole) for stage in whole.stages}
    contents = Contents(whole.folder / HOUSEKEEPING / "contents.json")
    stage_keys = keys(whole, contents, lambda stage: sources[stage.name])
    recipe = whole.needed_for(only)
    if dry_run:
        states = _states(recipe, stage_keys)
        _show([(s.name, s.task, _some(s.after), states[s.name]) for s in recipe.stages], PLAN)
        return 0
    with _claimed(recipe.folder / HOUSEKEEPING):
        contents.save()
        return Runner(recipe, stage_keys, _states(recipe, stage_keys), jobs).run()


class Runner:
    """Starts stages that are ready, in the recipe's order; starts no more after a failure or a signal."""

    def __init__(
        self, recipe: Recipe, stage_keys: Mapping[str, str], states: Mapping[str, State], jobs: int
    ) -> None:
        self.recipe, self.keys, self.states, self.jobs = recipe, stage_keys, states, jobs
        self.running: list[Job] = []
        self.results = {name: ("done before", "") for name, state in states.items() if state == "done"}
        self.status = 0

    def run(self) -> int:
        for stage in self.recipe.stages:
            if stage.name in self.results:
                self._say(stage, "done before")
        with self._signals_passed_on():
            while True:
                while (stage := self._next()) is not None:
                    self._start(stage)
                if not self.running:
                    break
                time.sleep(0.05)
                for job in [job for job in self.running if job.process.poll() is not None]:
                    self._finish(job)
        rows = [(s.name, s.task, *self.results.get(s.name, ("not run", ""))) for s in self.recipe.stages]
        _show(rows, RESULT)
        return self.status

    def _next(self) -> Stage | None:
        """The first stage that can start now."""
        if self.status or len(self.running) == self.jobs:
            return None
        begun = {*self.results, *(job.stage.name for job in self.running)}
        done = {name for name, (result, _) in self.results.items() if result.startswith("done")}
        waiting = (stage for stage in self.recipe.stages if stage.name not in begun)
        return next((stage for stage in waiting if done.issuperset(stage.after)), None)

    def _start(self, stage: Stage) -> None:
        folder, key = self.recipe.folder / stage.name, self.keys[stage.name]
        if self.states[stage.name] == "changed":
            set_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / ".started.json", {"key": key})
        request = _request(stage, self.recipe)
        command = ["madpo.launch.recipes.call"] if stage.task == CALL else ["madpo.launch.cli", stage.task]
        # A stage evaluates the model that its config names: its own folder holds no run.
        command += ["--base"] if stage.task == "evaluate" else []
        again = ", continued" if self.states[stage.name] == "interrupted" else ""
        log = folder / "log.txt"
        self._say(stage, f"madpo {stage.task} {request}{again}" + (f" > {log}" if self.jobs > 1 else ""))
        with log.open("ab") if self.jobs > 1 else nullcontext() as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *command, request],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env=os.environ | {LAUNCHER_PID: str(os.getpid())},
                start_new_session=True,
            )
        self.running.append(Job(stage, process, time.monotonic()))
        if self.status:  # a signal came while it started
            process.terminate()

    def _finish(self, job: Job) -> None:
        self.running.remove(job)
        seconds, status = time.monotonic() - job.started, job.process.returncode
        folder, took = self.recipe.folder / job.stage.name, str(timedelta(seconds=round(seconds)))
        _mask_request(job.stage, self.recipe)
        if status == 0:
            write_json(
                folder / ".done.json", {"key": self.keys[job.stage.name], "seconds": round(seconds, 1)}
            )
            self.results[job.stage.name] = "done", took
            self._say(job.stage, f"done in {took}")
            return
        status = status if status > 0 else 128 - status
        if status == Exit.AGAIN:
            self.results[job.stage.name] = "stopped", took
            self._say(job.stage, f"stopped after {took}; the same command continues it")
            self.status = Exit.AGAIN
            return
        self.results[job.stage.name] = f"failed ({status})", took
        self._say(job.stage, f"failed with status {status} after {took}")
        if self.jobs > 1:
            lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            print(*(f"    {line}" for line in lines[-LINES_OF_A_FAILURE:]), sep="\n", flush=True)
        self.status = self.status or status

    def _say(self, stage: Stage, text: str) -> None:
        number = self.recipe.stages.index(stage) + 1
        print(f"[{number}/{len(self.recipe.stages)}] {stage.name}: {text}", flush=True)

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        """Context manager: signals that stop a run go to the running stages, and no further one starts."""

        def forward(number: int, _frame: object) -> None:
            self.status = self.status or 128 + number
            for job in self.running:
                with suppress(ProcessLookupError):
                    os.killpg(job.process.pid, number)

        old = {number: signal.signal(number, forward) for number in (*SIGNALS, *ENDING)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
            for job in self.running:  # some are left only after an error of ours
                job.process.terminate()
                job.process.wait()
                _mask_request(job.stage, self.recipe)


def checked(stage: Stage, recipe: Recipe) -> str:
    """Raise UserError for a stage that could not start; returns the source text of a call's module."""
    where = f"{recipe.path}: stages.{stage.name}"
    if stage.function is None:
        from_tree({**stage.given, "output_dir": str(recipe.folder / stage.name)}, where, stage.task)
        return ""
    try:
        function, text = user_function.find(stage.function, recipe.path.parent)
        call.check(function, text, stage.given)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return text


def _request(stage: Stage, recipe: Recipe) -> str:
    """Write the file that a stage is started with, its config or its call; returns the path.

    Only its owner may read it, as it holds the secrets of a stage while that runs.
    """
    path, folder = _path_of_request(stage, recipe), str(recipe.folder / stage.name)
    if stage.function is None:
        tree = {"output_dir": folder, **stage.given}
    else:
        function, _ = user_function.find(stage.function, recipe.path.parent)
        tree = {"function": function, "arguments": stage.given, "output": folder}
    write_private(path, strict_yaml.dump(tree))
    return str(path)


def _path_of_request(stage: Stage, recipe: Recipe) -> Path:
    return recipe.folder / HOUSEKEEPING / f"{stage.name}.yaml"


def _mask_request(stage: Stage, recipe: Recipe) -> None:
    """Take the secrets out of the file that a stage was started with."""
    path = _path_of_request(stage, recipe)
    if path.is_file():
        write_private(path, strict_yaml.dump(masked(strict_yaml.read(path))))


def _states(recipe: Recipe, stage_keys: Mapping[str, str]) -> dict[str, State]:
    return {stage.name: _state(recipe.folder / stage.name, stage_keys[stage.name]) for stage in recipe.stages}


def _state(folder: Path, key: str) -> State:
    """The state of a stage, from the key files in its folder."""
    if _key_in(folder / ".done.json") == key:
        return "done"
    if _key_in(folder / ".started.json") == key:
        return "interrupted"
    return "changed" if folder.exists() and any(folder.iterdir()) else "new"


def _key_in(path: Path) -> str | None:
    return json.loads(path.read_text())["key"] if path.is_file() else None


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"output_dir: another madpo run is at work in {folder.parent}; wait for it") from None


PLAN = ("stage", "task", "depends on", "state")
RESULT = ("stage", "task", "result", "time")


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most + 1 else ""
    return ", ".join(names[:most] if more else names) + more


def _show(rows: Sequence[Sequence[str]], titles: Sequence[str]) -> None:
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    print()
    for row in (titles, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), flush=True)
