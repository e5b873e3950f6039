"""The starts of a run: written as they begin and end, read back, and what of their time was of use."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from harness import run_ranks

from madpo.trainer import lives
from madpo.trainer.dist import Shard
from madpo.trainer.errors import DataError
from madpo.trainer.lives import Life, effective_time, in_short, recorded
from madpo.trainer.stopping import StoppedError

ERRORS: list[tuple[Exception | None, int]] = [
    (None, 0),
    (StoppedError("stopped"), 75),
    (DataError("row 7"), 3),
    (RuntimeError("[gloo] Connection closed by peer"), 6),
    (KeyError("x"), 1),
]


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(lives, "gathered", lambda said: [said, "node7", said])


def test_how_each_start_ended_is_read_back(tmp_path, alone, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    for number, (error, _) in enumerate(ERRORS, start=1):
        steps = iter((10 * number, 10 * number + 5))
        try:
            with recorded(tmp_path, number, Shard(0, 2), lambda steps=steps: next(steps)):
                if error is not None:
                    raise error
        except type(error or ValueError()) as raised:
            assert raised is error
    found = lives.read(tmp_path)
    assert [x.status for x in found] == [status for _, status in ERRORS]
    assert [(x.life, x.first_step, x.last_step) for x in found] == [
        (n, 10 * n, 10 * n + 5) for n in range(1, 6)
    ]
    assert {(life.ranks, len(life.hosts), life.hosts[1], life.job) for life in found} == {
        (2, 2, "node7", "41")
    }


def test_a_start_that_was_cut_off_has_no_end(tmp_path, alone):
    with recorded(tmp_path, 1, Shard(0, 1), lambda: 0):
        (begun,) = lives.read(tmp_path)
        assert begun.ended is None and begun.status is None
    assert lives.read(tmp_path)[0].ended is not None


def two(shard: Shard, folder: Path) -> None:
    with recorded(folder, 1, shard, lambda: shard.rank):
        pass


@pytest.mark.ranks
def test_rank_0_writes(tmp_path):
    run_ranks(2, two, tmp_path)
    assert len((tmp_path / lives.NAME).read_text().splitlines()) == 2
    assert lives.read(tmp_path)[0].last_step == 0


OF_TEXT = json.dumps(asdict(Life(4, 0.0, 0, 1, [], "", "1")) | {"started": "now"})


@pytest.mark.parametrize("line", ["", "{", "[]", '{"life": 2}', '{"life": 3, "odd": 1}', "\udcff", OF_TEXT])
def test_lines_that_cannot_be_read_are_passed_over(tmp_path, alone, line):
    with recorded(tmp_path, 1, Shard(0, 1), lambda: 0):
        (tmp_path / lives.NAME).open("ab").write(line.encode(errors="surrogateescape") + b"\n")
    assert [begun.life for begun in lives.read(tmp_path)] == [1]


def life(number: int, started: float, **more: float) -> Life:
    return Life(number, started, 0, 1, ["a"], "", "1", **more)  # type: ignore[arg-type]


def test_time_that_is_lost_between_starts_or_in_steps_done_again_is_not_of_use():
    """Two starts of 100 s, 50 s apart; 30 steps of 4 s are kept."""
    lines = [
        {"step": 10, "time": 1050.0, "perf/step_time": 4.0},
        {"step": 30, "time": 1240.0, "perf/step_time": 4.0},
    ]
    begun = [life(1, 1000.0), life(2, 1150.0, ended=1250.0)]
    assert effective_time(begun, lines) == (120.0, 250.0)
    assert effective_time(begun[:1], lines) == (120.0, 240.0), "without an end, until the last line"
    assert effective_time([], lines) is None and effective_time(begun, []) is None


def test_ends_in_short():
    begun = [life(1, 0.0, status=6), life(2, 1.0), life(3, 2.0, status=75), life(4, 3.0)]
    assert in_short(begun, False) == "4 (status 6, cut off, stopped with a checkpoint, cut off)"
    assert in_short(begun, True).endswith("stopped with a checkpoint, running)")
    assert (
        in_short([life(n, 0.0, status=0) for n in range(9)], True) == "9 (..., done, done, done, done, done)"
    )
