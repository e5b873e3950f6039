"""`madpo run`: what runs, what is skipped, what is redone, what continues; nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from harness import LLAMA
from patience import patient

from madpo.launch.recipes.runner import run
from madpo.trainer.checkpoints.folders import newest_checkpoint, step_of
from madpo.trainer.config import strict_yaml

STEPS = '''
"""Functions of a recipe. Every call leaves a line in `calls`, beside this file."""
import os, time
from pathlib import Path

HERE = Path(__file__).parent

def note(output, text, sources=()):
    with (HERE / "calls").open("a") as file:
        file.write(output.name + "\\n")
    (output / "text").write_text(text + "".join((Path(x) / "text").read_text() for x in sources))

def fail(output, unless):
    note(output, "")
    print("a line of the stage's own", flush=True)
    if not os.path.exists(unless):
        raise SystemExit(3)

def meet(output, other):
    """Wait for a stage that has to run at the same time."""
    (HERE / output.name).write_text("here")
    deadline = time.monotonic() + PATIENCE
    while not (HERE / other).exists():
        assert time.monotonic() < deadline, f"{other} did not run at the same time"
        time.sleep(0.02)

def ask(output, api_key):
    request = output.parent / ".recipe" / f"{output.name}.yaml"
    note(output, f"{len(api_key)} {request.stat().st_mode & 0o777:o}")

def sentences(output):
    rows = ['{"prompt": "p", "completion": " %d is good"}\\n' % i for i in range(30)]
    (output / "train.jsonl").write_text("".join(rows))

def sleep(output, seconds):
    (output / "pid").write_text(str(os.getpid()))
    time.sleep(seconds)
'''.replace("PATIENCE", str(patient(30)))
CHAIN = """
vars: {x: one, y: two}
stages:
  a: {task: call, function: "steps.py:note", arguments: {text: "${x}"}}
  b: {task: call, function: "steps.py:note", arguments: {text: "${y}", sources: ["${a}"]}}
  c: {task: call, function: "steps.py:note", arguments: {text: "!", sources: ["${b}"]}}
  d: {task: call, function: "steps.py:note", arguments: {text: "alone"}}
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "steps.py").write_text(STEPS)
    return tmp_path


def written(folder: Path, text: str) -> Path:
    tree = {"output_dir": str(folder / "out"), **strict_yaml.parse(text, "the test")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def go(path: Path, *overrides: str, jobs: int = 1, only: tuple[str, ...] = (), dry_run: bool = False) -> int:
    return run(path, overrides, jobs, only, dry_run)


def calls(folder: Path) -> list[str]:
    """The stages that were called since the last look."""
    path = folder / "calls"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def test_a_second_run_skips_all_and_a_change_redoes_its_dependents(folder, capfd):
    path = written(folder, CHAIN)
    assert go(path) == 0
    assert calls(folder) == ["a", "b", "c", "d"]
    assert (folder / "out" / "c" / "text").read_text() == "!twoone"
    assert go(path) == 0 and calls(folder) == []
    assert capfd.readouterr().out.count(": done before") == 4

    assert go(path, "vars.y=three") == 0
    assert calls(folder) == ["b", "c"]
    assert (folder / "out" / "c" / "text").read_text() == "!threeone"
    assert (folder / "out" / "c.old-1" / "text").read_text() == "!twoone"

    (folder / "steps.py").write_text(STEPS + "# changed\n")
    assert go(path, "vars.y=three") == 0 and calls(folder) == ["a", "b", "c", "d"]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(folder, capfd):
    path = written(folder, CHAIN)
    assert go(path, dry_run=True) == 0
    assert not (folder / "out").exists()
    assert go(path, only=("b",)) == 0 and calls(folder) == ["a", "b"]
    capfd.readouterr()
    assert go(path, "b.text=other", dry_run=True) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert lines[1:] == [
        ["stage", "task", "depends", "on", "state"],
        ["a", "call", "done"],
        ["b", "call", "a", "changed"],
        ["c", "call", "b", "new"],
        ["d", "call", "new"],
    ]
    assert calls(folder) == []


def test_a_secret_reaches_its_stage_and_stays_in_no_file(folder, capfd):
    text = 'stages: {a: {task: call, function: "steps.py:ask", arguments: {api_key: 5entinel}}}'
    assert go(written(folder, text)) == 0
    assert (folder / "out" / "a" / "text").read_text() == "8 600"
    files = [file for file in (folder / "out").rglob("*") if file.is_file()]
    assert files and not [file for file in files if b"5entinel" in file.read_bytes()]
    assert "5entinel" not in capfd.readouterr().out


def test_data_from_outside_counts_by_content(folder):
    (folder / "rows").write_text("1")
    text = 'stages: {a: {task: call, function: "steps.py:note", arguments: {text: ROWS}}}'
    path = written(folder, text.replace("ROWS", str(folder / "rows")))
    assert go(path) == 0 and calls(folder) == ["a"]
    os.utime(folder / "rows", (1, 1))
    assert go(path) == 0 and calls(folder) == []
    (folder / "rows").write_text("2")
    assert go(path) == 0 and calls(folder) == ["a"]


FAILING = """
stages:
  bad: {task: call, function: "steps.py:fail", arguments: {unless: SWITCH}}
  after: {task: call, function: "steps.py:note", arguments: {text: x}, after: [bad]}
  apart: {task: call, function: "steps.py:note", arguments: {text: y}}
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failure_stops_what_has_not_begun_and_the_next_run_goes_on(folder, capfd, jobs):
    path = written(folder, FAILING.replace("SWITCH", str(folder / "out" / "bad" / "switch")))
    assert go(path, jobs=jobs) == 3
    ran = {"bad"} if jobs == 1 else {"bad", "apart"}  # what was under way came to its end
    assert set(calls(folder)) == ran
    out = capfd.readouterr().out
    assert "bad: failed with status 3" in out and "a line of the stage's own" in out
    table = {line.split()[0]: line.split()[2] for line in out.split("\n\n")[-1].splitlines()[1:]}
    assert table == {"bad": "failed", "after": "not", "apart": "not" if jobs == 1 else "done"}

    (folder / "out" / "bad" / "switch").touch()
    assert go(path, jobs=jobs) == 0
    assert set(calls(folder)) == {"bad", "after", "apart"} - (ran - {"bad"})
    assert "continued" in capfd.readouterr().out
    assert not list((folder / "out").glob("*.old-*"))


def test_jobs_overlap(folder):
    stages = {
        name: {"task": "call", "function": "steps.py:meet", "arguments": {"other": other}}
        for name, other in (("left", "right"), ("right", "left"))
    }
    path = written(folder, json.dumps({"stages": stages}))
    assert go(path, jobs=2) == 0


def test_every_config_is_checked_before_the_first_stage(folder):
    text = CHAIN + "  e: {task: train, config: {optim: {lrr: 1}}}\n"
    with pytest.raises(ValueError, match=r"(?s)recipe.yaml: stages.e: .*optim.lrr: unknown key"):
        go(written(folder, text))
    with pytest.raises(ValueError, match=r"stages.a: note takes no argument txt, did you mean 'text'"):
        go(written(folder, CHAIN.replace('text: "${x}"', 'txt: "${x}"')))
    assert not (folder / "out").exists()


def test_two_runs_of_one_folder_exclude_each_other(folder):
    from filelock import FileLock

    path = written(folder, CHAIN)
    (folder / "out" / ".recipe").mkdir(parents=True)
    with (
        FileLock(folder / "out" / ".recipe" / "lock"),
        pytest.raises(ValueError, match="another madpo run is at work"),
    ):
        go(path)


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "madpo.launch.cli", "run", str(path), *arguments]
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(path.parent / "extensions")}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True
    )


def wait_for(condition: Any, seconds: float = 90) -> None:
    deadline = time.monotonic() + patient(seconds)
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Those that have a path in `folder` on their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


SLEEPING = """
stages:
  a-${i}: {for: {i: [1, 2]}, task: call, function: "steps.py:sleep", arguments: {seconds: 99}}
"""


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_stage_outlives_the_run(folder, number):
    process = start(written(folder, SLEEPING), "--jobs", "2")
    try:
        pids = [folder / "out" / f"a-{i}" / "pid" for i in (1, 2)]
        wait_for(lambda: all(pid.exists() for pid in pids))
        process.send_signal(number)
        wait_for(lambda: not processes_of(folder), 20)
        out = process.communicate(timeout=patient(20))[0]
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), out
    finally:
        for left in processes_of(folder):
            left.kill()


TRAINING = """
defaults:
  model: {tokenizer_name_or_path: "TOKENIZER"}
  train: {bf16: false, global_batch_size: 4, micro_batch_tokens: 256, logging_steps: 1}
  launch: {num_processes: 1}
stages:
  data: {task: call, function: "steps.py:sentences"}
  sft:
    task: sft
    config:
      model: {init_config: INIT}
      data: {dataset_name: "${data}/train.jsonl", max_length: 64, cache_dir: "CACHE"}
      train: {max_steps: 40, save_steps: 2}
"""


@pytest.mark.ranks
@pytest.mark.launcher
def test_a_training_that_was_killed_continues(folder, tokenizer_folder):
    """kill -9 between two checkpoints; the run after it goes on from there, and the one after that skips."""
    tree = strict_yaml.parse(TRAINING, "the test")
    tree["defaults"]["model"]["tokenizer_name_or_path"] = str(tokenizer_folder)
    config = tree["stages"]["sft"]["config"]
    config["model"]["init_config"] = LLAMA
    config["data"]["cache_dir"] = str(folder / "cache")
    path = written(folder, yaml.safe_dump(tree, sort_keys=False))
    sft = folder / "out" / "sft"

    process = start(path)
    try:
        wait_for(lambda: newest_checkpoint(sft / "checkpoints"))
        process.kill()
        wait_for(lambda: not processes_of(folder), 20)
        newest = newest_checkpoint(sft / "checkpoints")
        assert newest is not None
        saved = step_of(newest.name)
        assert saved < 40 and not (sft / ".done.json").exists()
        process.communicate()

        process = start(path)
        out = process.communicate(timeout=patient(120))[0]
        assert process.returncode == 0, out
        assert "data: done before" in out and "sft: madpo sft" in out and ", continued" in out
        steps = [json.loads(line)["step"] for line in (sft / "metrics.jsonl").read_text().splitlines()]
        assert steps[:40] == list(range(1, 41))
        assert json.loads((sft / "run.json").read_text())["command"].startswith("madpo sft ")
        assert (sft / "model" / "model.safetensors").is_file() and (sft / "report.html").is_file()

        process = start(path)
        out = process.communicate(timeout=patient(60))[0]
        assert process.returncode == 0 and out.count(": done before") == 2
        assert not list((folder / "out").glob("*.old-*"))
    finally:
        for left in processes_of(folder):
            left.kill()
