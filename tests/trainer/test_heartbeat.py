"""Where ranks are, in their own words; which are gone or silent; the stacks of one that stays."""

from __future__ import annotations

import os
import subprocess
import time

from madpo.trainer import heartbeat
from madpo.trainer.heartbeat import Beat, Heartbeat, beats_in, missing_ranks


def until(what, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_rank_says_where_it_is_and_leaves_its_stacks_if_it_stays(tmp_path):
    heartbeat.at("nowhere: nobody listens")
    with Heartbeat(tmp_path, 3, timeout_minutes=0.01):  # writes every 0.06 s, stacks after 0.48 s
        heartbeat.at("step 7")
        until(lambda: [beat.place for beat in beats_in(tmp_path)] == ["step 7"])
        (beat,) = beats_in(tmp_path)
        assert (beat.rank, beat.process, beat.is_gone, beat.silent_for) == (3, os.getpid(), False, 0.0)
        path = tmp_path / "hangs" / "rank-00003.txt"
        until(path.exists)
        until(lambda: "test_a_rank_says_where_it_is" in path.read_text())
    assert path.read_text().startswith("rank 3 has been in step 7 for ")
    time.sleep(0.25)
    (beat,) = beats_in(tmp_path)
    assert beat.silent_for > 0.15
    heartbeat.forget(tmp_path)
    assert beats_in(tmp_path) == [] and not path.exists()


def test_a_place_of_another_kind_is_written_at_once(tmp_path):
    """So that a rank which freezes there is looked for there; a step after a step can wait for its turn."""
    with Heartbeat(tmp_path, 0, timeout_minutes=30):  # writes every 10 s
        until(lambda: [beat.place for beat in beats_in(tmp_path)] == ["start"])
        heartbeat.at("step 1")
        until(lambda: [beat.place for beat in beats_in(tmp_path)] == ["step 1"], seconds=5)
        heartbeat.at("step 2")
        time.sleep(0.3)
        assert [beat.place for beat in beats_in(tmp_path)] == ["step 1"]


def test_ranks_that_are_gone_or_silent_are_named(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    now, host = time.time(), os.uname().nodename
    beats = [
        Beat(0, host, os.getpid(), "step 8", 1.0, now, 10.0),
        Beat(1, host, gone.pid, "step 8", 1.0, now, 10.0),
        Beat(2, "node2", 7, "step 7", 1.0, now - 45, 10.0),
        Beat(3, "node2", 8, "step 8", 1.0, now - 25, 10.0),
    ]
    (tmp_path / heartbeat.FOLDER).mkdir()
    for beat in beats:
        path = tmp_path / heartbeat.FOLDER / f"rank-{beat.rank:05d}.json"
        path.write_text(heartbeat.json.dumps(vars(beat)))
    (tmp_path / heartbeat.FOLDER / "rank-00004.json").write_text("{")
    assert beats_in(tmp_path) == beats
    text = missing_ranks(tmp_path, 0)
    first, second = text.split("; ")
    assert first == f"rank 1 ({host}, process {gone.pid}) is gone, last in step 8"
    assert second.startswith("rank 2 (node2, process 7) has been silent for 45 s, last in step 7")
