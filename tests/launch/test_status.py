"""What `madpo status` says of a run that lives, has ended, or was never there."""

from __future__ import annotations

import json
import os
import time

import pytest
from filelock import FileLock

from madpo.launch.status import show
from madpo.trainer import outcome
from madpo.trainer.errors import Exit, UserError
from madpo.trainer.heartbeat import Heartbeat
from madpo.trainer.run_folder import LOCK


def written(folder, status: int | None = None) -> None:
    (folder / "run.json").write_text(json.dumps({"total_steps": 100}))
    line = {"step": 40, "time": time.time(), "loss": 0.5, "perf/step_time": 2.0}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    checkpoint = folder / "checkpoints" / "step-00000030"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    (folder / "checkpoints" / "step-00000020.damaged").mkdir()
    (folder / "incidents.jsonl").write_text('{"kind": "skipped"}\n' * 2 + '{"kind": "sk')
    if status is not None:
        outcome.write(folder, status, "error: first\nerror: last" if status > 1 else "", "train")


REST = [
    "step 40 of 100, 0:02:00 left at 2.00 s a step, loss 0.5000 (logged 0:00:00 ago)",
    "checkpoint of step 30, 0:00:00 ago",
    "  damaged: step-00000020.damaged",
    "2 x skipped (incidents.jsonl)",
]


def test_a_run_that_lives(tmp_path, capsys):
    written(tmp_path)
    with FileLock(tmp_path / LOCK), Heartbeat(tmp_path, 0, 30.0) as beat:
        beat.at("start")
        while not (tmp_path / ".ranks" / "rank-00000.json").exists():
            time.sleep(0.01)
        assert show(tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == ["alive: 1 rank, start", *REST]


ENDS = {
    Exit.DONE: ["done, 0:00:00 ago"],
    Exit.AGAIN: ["stopped; the same command continues, 0:00:00 ago", "  error: first", "  error: last"],
    Exit.DATA: ["failed with status 3, 0:00:00 ago", "  error: first", "  error: last"],
}


@pytest.mark.parametrize("status", ENDS)
def test_a_run_that_has_ended(tmp_path, capsys, status):
    written(tmp_path, status)
    assert show(tmp_path) == status
    assert capsys.readouterr().out.splitlines() == [*ENDS[status], *REST]


def test_a_run_that_was_killed(tmp_path, capsys):
    written(tmp_path)
    gone = {"rank": 0, "host": os.uname().nodename, "process": 2**22, "place": "step 41", "seconds": 1.0}
    (tmp_path / ".ranks").mkdir()
    beat = {**gone, "time": time.time() - 60, "every": 10.0}
    (tmp_path / ".ranks" / "rank-00000.json").write_text(json.dumps(beat))
    assert show(tmp_path) == Exit.LOST_PEER
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "ended without a word, 0:01:00 ago; last in step 41" and rest == REST


@pytest.mark.parametrize(("spread", "is_named"), [(0.38, True), (0.09, False)])
def test_a_rank_for_which_the_others_wait_is_named(tmp_path, capsys, spread, is_named):
    written(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        slow = {"perf/slowest_rank": 1, "perf/rank_spread": spread}
        file.write(json.dumps({"step": 41, "time": time.time(), "loss": 0.4, **slow}) + "\n")
    beat = {"rank": 1, "host": "node7", "process": 12, "place": "step 42", "seconds": 1.0}
    (tmp_path / ".ranks").mkdir()
    (tmp_path / ".ranks" / "rank-00001.json").write_text(
        json.dumps({**beat, "time": time.time(), "every": 10.0})
    )
    show(tmp_path)
    line = "  rank 1 (node7, process 12) is slow: the others wait for it 38% of the time"
    assert (line in capsys.readouterr().out.splitlines()) is is_named


def test_a_run_that_was_started_twice_says_how_much_of_its_time_was_of_use(tmp_path, capsys):
    written(tmp_path, Exit.DONE)
    now, first = time.time(), {"ranks": 1, "hosts": ["a"], "job": "", "madpo": "1"}
    begun = [
        {"life": 1, "started": now - 100, "first_step": 0, **first},
        {"life": 2, "started": now - 50, "first_step": 20, **first},
        {"life": 2, "ended": now, "last_step": 40, "status": 0},
    ]
    (tmp_path / "lives.jsonl").write_text("".join(json.dumps(line) + "\n" for line in begun))
    show(tmp_path)
    line = "starts: 2 (cut off, done); 80% of 0:01:40 went into steps that are kept"
    assert line in capsys.readouterr().out.splitlines()


def test_an_empty_folder_and_none(tmp_path, capsys):
    assert show(tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == ["nothing has run here", "no checkpoint yet"]
    with pytest.raises(UserError, match="no such folder"):
        show(tmp_path / "nowhere")
