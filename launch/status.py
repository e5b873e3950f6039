"""`madpo status RUN`: what a run does, or how it has ended, from the files in its folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from madpo.trainer import heartbeat, lives, outcome
from madpo.trainer.checkpoints.folders import MANIFEST, damaged_in, newest_checkpoint, step_of
from madpo.trainer.counted import counted
from madpo.trainer.errors import Exit, UserError
from madpo.trainer.files import read_object
from madpo.trainer.run_folder import INCIDENTS, is_training, read_metrics

SPREAD = 0.1
"""A rank for which the others wait for more than this share of the time is named."""


def show(folder: Path) -> int:
    """Print the status of a run. The exit status is 0 if it lives or is done, else that of its end."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of a run")
    beats, ended = heartbeat.beats_in(folder), outcome.read(folder)
    is_alive = any(not beat.silent_for and not beat.is_gone for beat in beats)
    is_alive = is_alive and (ended is None or is_training(folder))
    for line in (
        *_life(beats, ended, is_alive),
        *_progress(folder, beats),
        *_lives(folder, is_alive),
        *_checkpoints(folder),
        *_incidents(folder),
    ):
        print(line)
    if is_alive or not (beats or ended):
        return Exit.DONE
    return Exit.LOST_PEER if ended is None else ended.status


def _life(beats: list[heartbeat.Beat], ended: outcome.Outcome | None, is_alive: bool) -> Iterator[str]:
    if is_alive:
        yield f"alive: {counted(len(beats), 'rank')}, {_places(beats)}"
        for beat in beats:
            if beat.is_gone or beat.silent_for:
                silent = "gone" if beat.is_gone else f"silent for {beat.silent_for:.0f} s"
                yield f"  {beat.who}: {silent}, last in {beat.place}"
    elif ended is not None:
        name = {Exit.DONE: "done", Exit.AGAIN: "stopped; the same command continues"}
        yield f"{name.get(Exit(ended.status), f'failed with status {ended.status}')}, {_ago(ended.time)}"
        yield from (f"  {line}" for line in ended.text.splitlines()[-3:])
    elif beats:
        newest = max(beat.time for beat in beats)
        yield f"ended without a word, {_ago(newest)}; last in {_places(beats)}"
    else:
        yield "nothing has run here"


def _places(beats: list[heartbeat.Beat]) -> str:
    """Where the ranks are; those that lag behind are the interesting ones."""
    places = dict.fromkeys(beat.place for beat in beats)
    if len(places) == 1:
        return next(iter(places))
    return "; ".join(
        f"{place}: rank {', '.join(str(beat.rank) for beat in beats if beat.place == place)}"
        for place in places
    )


def _progress(folder: Path, beats: list[heartbeat.Beat]) -> Iterator[str]:
    lines = [record for record in read_metrics(folder) if "loss" in record]
    total = read_object(folder / "run.json").get("total_steps")
    if not lines or not total:
        return
    last = lines[-1]
    left = (total - last["step"]) * last.get("perf/step_time", 0.0)
    speed = f"{last['perf/step_time']:.2f} s a step" if "perf/step_time" in last else ""
    ahead = f", {timedelta(seconds=round(left))} left at {speed}" if left else ""
    yield f"step {last['step']:,} of {total:,}{ahead}, loss {last['loss']:.4f} (logged {_ago(last['time'])})"
    if last.get("perf/rank_spread", 0.0) > SPREAD:
        slow = int(last["perf/slowest_rank"])
        who = next((beat.who for beat in beats if beat.rank == slow), f"rank {slow}")
        yield f"  {who} is slow: the others wait for it {last['perf/rank_spread']:.0%} of the time"


def _lives(folder: Path, is_alive: bool) -> Iterator[str]:
    """The starts, if there was more than one, and how much of the time has trained."""
    begun = lives.read(folder)
    lines = [record for record in read_metrics(folder) if "perf/step_time" in record]
    effective = lives.effective_time(begun, lines)
    if len(begun) > 1 and effective is not None:
        kept, whole = effective[0], timedelta(seconds=round(effective[1]))
        share = f"{kept / effective[1]:.0%} of {whole} went into steps that are kept"
        yield f"starts: {lives.in_short(begun, is_alive)}; {share}"


def _checkpoints(folder: Path) -> Iterator[str]:
    root = folder / "checkpoints"
    newest = newest_checkpoint(root)
    if newest is None:
        yield "no checkpoint yet"
    else:
        yield f"checkpoint of step {step_of(newest.name):,}, {_ago((newest / MANIFEST).stat().st_mtime)}"
    if damaged := damaged_in(root):
        yield f"  damaged: {', '.join(path.name for path in damaged)}"


def _incidents(folder: Path) -> Iterator[str]:
    path, kinds = folder / INCIDENTS, list[str]()
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, TypeError, KeyError):  # the last one of a run that was killed may be torn
            kinds.append(json.loads(line)["kind"])
    for kind in dict.fromkeys(kinds):
        yield f"{kinds.count(kind)} x {kind} ({INCIDENTS})"
    stacks = sorted((folder / heartbeat.STACKS).glob("rank-*.txt"))
    if stacks:
        ranks, place = counted(len(stacks), "rank"), folder / heartbeat.STACKS
        yield f"stacks of {ranks} that stayed in one place: {place}"


def _ago(moment: float) -> str:
    return f"{timedelta(seconds=round(max(0.0, time.time() - moment)))} ago"
