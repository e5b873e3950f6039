"""Checkpoints with a stand-in for DeepSpeed's shards: the order of a commit, what is kept, what is refused.

Whole runs that are cut off and continued are in test_run.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from commits import Commits, no_rename
from harness import make_config

from madpo.trainer import checkpoint
from madpo.trainer.dist import Shard
from madpo.trainer.engine import Engine
from madpo.trainer.state import TrainState

RUN = {"seed": 42, "objective.loss_type": "dpo", "objective.beta": 0.1, "optim.lr": 1e-3}


class Shards:
    """The part of an engine that writes and reads shards."""

    def __init__(self) -> None:
        self.saved: list[tuple[str, bool]] = []  # tag, and whether frozen weights are in it
        self.is_there = True
        self.module = type("Module", (), {"parameters": lambda self: iter(())})()

    def save_checkpoint(
        self, root: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool
    ) -> None:
        assert not save_latest, "DeepSpeed would name it in `latest` before all ranks have written"
        (Path(root) / tag).mkdir(parents=True)
        (Path(root) / tag / "shard").write_text(tag)
        self.saved.append((tag, not exclude_frozen_parameters))

    def load_checkpoint(self, root: str, tag: str, **options: Any) -> tuple[str | None, dict[str, Any]]:
        assert options == {"load_module_strict": False, "load_lr_scheduler_states": False}
        return (f"{root}/{tag}" if self.is_there else None), {}


def around(shards: Shards) -> Engine:
    """An engine whose DeepSpeed is the stand-in."""
    engine: Any = Engine.__new__(Engine)
    engine.deepspeed = shards
    return engine


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> None:
    """One process without a process group."""

    def refuse(problem: str | None) -> None:
        if problem:
            raise ValueError(problem)

    monkeypatch.setattr(checkpoint, "barrier", lambda: None)
    monkeypatch.setattr(checkpoint, "from_main", lambda value: value)
    monkeypatch.setattr(checkpoint, "raise_if_any", refuse)


def save(engine: Shards, root: Path, step: int, keep: int = 2, rank: int = 0, **options: Any) -> TrainState:
    state = TrainState(step, 8 * step, 100 * step, {"mean": [0.5 * step]})
    checkpoint.save(around(engine), root, state, RUN, Shard(rank, 2), keep, **options)
    return state


def folders(root: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in root.glob("step-*"))


def test_the_pointer_is_on_disk_before_it_gets_its_name_and_the_old_checkpoint_goes_last(
    tmp_path, monkeypatch
):
    engine = Shards()
    save(engine, tmp_path, 1, keep=1)
    commits = Commits().watch(monkeypatch)
    save(engine, tmp_path, 2, keep=1)
    assert commits.calls == [("replace", "latest"), ("remove", "step-00000001")]
    assert not commits.unsynced
    assert (tmp_path / "latest").read_text() == "step-00000002"


def test_a_commit_that_fails_costs_nothing_that_was_there(tmp_path, monkeypatch):
    engine = Shards()
    old = save(engine, tmp_path, 1, keep=1)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(os, "replace", no_rename)
        save(engine, tmp_path, 2, keep=1)
    tag = checkpoint.latest(tmp_path, RUN)
    assert tag == "step-00000001" and (tmp_path / tag / "shard").read_text() == tag
    assert checkpoint.load(around(engine), tmp_path, tag) == old


def test_shards_that_cannot_be_written_are_not_named(tmp_path, monkeypatch):
    engine = Shards()
    save(engine, tmp_path, 1, keep=1)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"), monkeypatch.context() as patch:
        patch.setattr(engine, "save_checkpoint", fail)
        save(engine, tmp_path, 2, keep=1)
    assert checkpoint.latest(tmp_path, RUN) == "step-00000001"


def test_the_state_is_there_before_the_ranks_meet_and_the_commit_after(tmp_path, monkeypatch):
    """A rank that is still writing has not come to the barrier yet."""
    seen = []

    def barrier() -> None:
        seen.append(
            ((tmp_path / "step-00000003" / "train_state.json").exists(), (tmp_path / "latest").exists())
        )

    monkeypatch.setattr(checkpoint, "barrier", barrier)
    save(Shards(), tmp_path, 3)
    assert seen == [(True, False), (True, True)]


def test_other_ranks_write_their_shards_and_nothing_else(tmp_path):
    save(Shards(), tmp_path, 3, rank=1)
    assert [path.name for path in tmp_path.rglob("*")] == ["step-00000003", "shard"]


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_checkpoints_are_kept(tmp_path, keep):
    engine = Shards()
    for step in (2, 4, 6, 10, 100):
        save(engine, tmp_path, step, keep)
    assert folders(tmp_path) == [2, 4, 6, 10, 100][-keep:]


def test_leftovers_of_later_steps_are_neither_counted_nor_removed(tmp_path):
    """They are of a run that was cut off, and will be written over when training comes to them."""
    engine = Shards()
    save(engine, tmp_path, 9)
    for step in (1, 2, 3):
        save(engine, tmp_path, step, keep=2)
    assert folders(tmp_path) == [2, 3, 9]


def test_only_a_reference_that_moves_is_in_the_checkpoint(tmp_path):
    engine = Shards()
    save(engine, tmp_path, 1)
    save(engine, tmp_path, 2, with_reference=True)
    assert engine.saved == [("step-00000001", False), ("step-00000002", True)]


def test_what_was_saved_is_loaded(tmp_path):
    engine = Shards()
    state = save(engine, tmp_path, 7)
    assert checkpoint.load(around(engine), tmp_path, "step-00000007") == state
    assert checkpoint.stored_objective(tmp_path) == {"loss_type": "dpo", "beta": 0.1}


def test_nothing_committed_is_nothing_to_continue(tmp_path):
    assert checkpoint.latest(tmp_path, RUN) is None and checkpoint.stored_objective(tmp_path) is None
    (tmp_path / "step-00000001").mkdir()
    assert checkpoint.latest(tmp_path, RUN) is None
    (tmp_path / "latest").write_text("step-00000001\n")
    assert checkpoint.stored_objective(tmp_path) is None
    with pytest.raises(ValueError, match="step-00000001: rank 0 resumes from here, but it cannot be read"):
        checkpoint.latest(tmp_path, RUN)


def test_a_committed_checkpoint_without_its_shards_cannot_be_loaded(tmp_path):
    engine = Shards()
    save(engine, tmp_path, 7)
    engine.is_there = False
    with pytest.raises(
        ValueError, match="step-00000007: the checkpoint cannot be loaded; train with --fresh"
    ):
        checkpoint.load(around(engine), tmp_path, "step-00000007")


def test_another_value_of_any_key_is_refused_by_name(tmp_path):
    save(Shards(), tmp_path, 1)
    assert checkpoint.latest(tmp_path, RUN) == "step-00000001"
    for key in RUN:
        with pytest.raises(ValueError, match=rf"{key}: {RUN[key]!r} there, 'x' now\nset it back"):
            checkpoint.latest(tmp_path, {**RUN, key: "x"})
    # A key that the run did not have; one that it had and that is no longer asked for is no hindrance.
    with pytest.raises(ValueError, match="new: None there, None now"):
        checkpoint.latest(tmp_path, {**RUN, "new": None})
    assert checkpoint.latest(tmp_path, {"seed": 42}) == "step-00000001"


def test_the_identity_of_a_model_is_what_decides_which_weights_fit(tmp_path):
    config = make_config(
        tmp_path, {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d.jsonl"}}
    )
    found = checkpoint.model_identity(config, Shard(0, 2))
    whole = checkpoint.identity(config, Shard(0, 2), "content")
    assert found == {key: whole[key] for key in found}
    assert {key.split(".")[0] for key in found} == {"number of ranks", "model", "peft", "deepspeed"}
    assert whole["data (content)"] == "content" and whole["number of ranks"] == 2
    assert json.loads(json.dumps(whole)) == whole
