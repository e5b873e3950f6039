"""Saving on two real ranks: the order of a commit, a write that fails, a writer of an earlier start."""

from __future__ import annotations

import copy
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commits import Commits
from harness import run_ranks

from madpo.trainer import dist
from madpo.trainer.agreement import Agreement
from madpo.trainer.checkpoints import saver as module
from madpo.trainer.checkpoints.choose import choose
from madpo.trainer.checkpoints.folders import checkpoints_in
from madpo.trainer.checkpoints.load import load
from madpo.trainer.checkpoints.manifest import Manifest, fault_in, read
from madpo.trainer.checkpoints.saver import Keep, Saver
from madpo.trainer.config.schema import Config
from madpo.trainer.dist import Shard
from madpo.trainer.engine import Engine
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.state import TrainState

pytestmark = pytest.mark.ranks


class Run:
    """An engine, a state and a saver: what a run has, without its steps."""

    def __init__(self, config: Config, shard: Shard, root: Path, in_background: bool, **options: Any) -> None:
        self.engine: Engine = start_engine(config, load_tokenizer(config.model), training=True)
        self.state, self.root, self.lines = TrainState(), root, list[str]()
        root.parent.mkdir(exist_ok=True)
        settings = {
            "keep": Keep(2),
            "check_owner": lambda: None,
            "with_reference": False,
            "say": self.lines.append,
            **options,
        }
        self.saver = Saver(
            self.engine,
            root,
            shard,
            agreement=Agreement(),
            manifest=lambda: Manifest(copy.deepcopy(self.state), {"seed": 42}, 2, 3, 1, {}, {}),
            in_background=in_background,
            **settings,
        )

    def change_weights(self) -> None:
        """What a step does to the state: one of AdamW, of a gradient of ones."""
        self.state.step += 1
        sharded = self.engine.deepspeed.optimizer
        sharded._set_fp32_optimizer_param_groups()
        for flat in sharded.fp32_partitioned_groups_flat:
            flat.grad = torch.ones_like(flat)
        sharded.optimizer.step()
        sharded.optimizer.zero_grad()
        sharded._clear_fp32_optimizer_param_groups()

    def tensors(self) -> list[torch.Tensor]:
        """Master weights and moments."""
        sharded = self.engine.deepspeed.optimizer
        masters = sharded.fp32_partitioned_groups_flat
        moments = [
            sharded.optimizer.state[flat][key] for flat in masters for key in ("exp_avg", "exp_avg_sq")
        ]
        return [tensor.clone() for tensor in (*masters, *moments)]


def saved_and_loaded(shard, config: Config, root: str, in_background: bool) -> Any:
    """Save at step 1, go on changing the weights at once, save at step 2; what is read back of each."""
    run = Run(config, shard, Path(root), in_background)
    wanted = []
    for _ in range(2):
        run.change_weights()
        wanted.append(run.tensors())
        run.saver.save()
        run.change_weights()
        run.state.step -= 1
    run.saver.finish()
    found = []
    for folder in reversed(checkpoints_in(run.root)):
        run.change_weights()
        manifest = read(folder)
        assert fault_in(folder, manifest.files, manifest.files) is None
        run.engine.load(folder, list(manifest.files), 2, 3)
        found.append((manifest.state.step, run.tensors()))
    assert [step for step, _ in found] == [1, 2] and run.saver.last_step == 2
    same = all(
        torch.equal(*pair)
        for want, (_, got) in zip(wanted, found, strict=True)
        for pair in zip(want, got, strict=True)
    )
    run.saver.close()
    return same, run.lines, sorted(path.name for path in run.root.iterdir())


@pytest.mark.parametrize("in_background", [False, True], ids=["blocking", "in the background"])
def test_a_checkpoint_is_of_the_moment_at_which_it_was_asked_for(config, tmp_path, in_background):
    names = ["step-00000001", "step-00000002"]
    results = run_ranks(2, saved_and_loaded, config, str(tmp_path / "run" / "checkpoints"), in_background)
    assert results == [(True, [], names)] * 2


def order(shard, config: Config, root: str) -> Any:
    run = Run(config, shard, Path(root), in_background=False, keep=Keep(1))
    run.change_weights()
    run.saver.save()
    with pytest.MonkeyPatch.context() as patch:
        commits = Commits().watch(patch)
        run.change_weights()
        run.saver.save()
        return commits.calls, commits.unsynced


def test_all_is_on_the_disk_before_the_rename_and_the_old_checkpoint_goes_last(config, tmp_path):
    (calls, unsynced), other = run_ranks(2, order, config, str(tmp_path / "run" / "checkpoints"))
    wanted = [
        ("replace", "manifest.json"),
        ("replace", "step-00000002"),
        ("remove", "step-00000001.partial"),  # renamed, so that a kill leaves no half of it
    ]
    assert [call for call in calls if call in wanted] == wanted
    assert unsynced in ([], ["step-00000002"])  # a folder is synced by its names
    assert other == ([], [])


def failing(shard, config: Config, root: str, in_background: bool, failing_rank: int) -> Any:
    """The disk of one rank is full at the second save and has space again at the third."""
    run = Run(config, shard, Path(root), in_background)
    seen = []
    for step in (1, 2, 3):
        run.change_weights()
        with pytest.MonkeyPatch.context() as patch:
            if step == 2 and shard.rank == failing_rank:
                patch.setattr(torch, "save", full)
            run.saver.save()
            run.saver.finish()
        seen.append((run.saver.last_step, sorted(path.name for path in run.root.iterdir())))
        dist.barrier()
    return seen, run.lines


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("in_background", [False, True], ids=["blocking", "in the background"])
def test_a_full_disk_of_one_rank_costs_one_checkpoint_and_is_said(config, tmp_path, in_background):
    root = tmp_path / "run" / "checkpoints"
    results = run_ranks(2, failing, config, str(root), in_background, 1)
    first, third = "step-00000001", "step-00000003"
    for seen, lines in results:
        assert seen == [(1, [first]), (1, [first]), (3, [first, third])]
        (line,) = lines
        assert line.startswith("no checkpoint of step 2: rank 1: ") and line.endswith(
            "No space left on device"
        )
        assert "zero_pp_rank_1" in line and str(root) in line


def prepared(shard, config: Config, root: str, patches: Callable[[Any, Run], None]) -> Any:
    run = Run(config, shard, Path(root), in_background=True)
    run.change_weights()
    with pytest.MonkeyPatch.context() as patch:
        patches(patch, run)
        run.saver.save()
        run.saver.finish()
    return run.saver.last_step, run.lines, [path.name for path in checkpoints_in(run.root)]


def small_disk(patch: Any, run: Run) -> None:
    usage = type("Usage", (), {"free": 1000})
    patch.setattr(module.shutil, "disk_usage", lambda _: usage)


def file_in_the_way(patch: Any, run: Run) -> None:
    run.root.touch()


REFUSED = {
    "too little disk": (small_disk, r"has 0\.0 GB free and a checkpoint needs 0\.0 GB; make room"),
    "a file in the way": (file_in_the_way, r"cannot be made \((File exists|Not a directory)\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stands_against_a_save_is_said_on_all_ranks_before_anything_is_written(config, tmp_path, name):
    patches, reason = REFUSED[name]
    for last, lines, found in run_ranks(2, prepared, config, str(tmp_path / "run" / "checkpoints"), patches):
        assert last is None and found == []
        assert len(lines) == 1
        assert re.search(reason, lines[0])


def file_in_the_place_of_a_half_written_one(patch: Any, run: Run) -> None:
    run.root.mkdir(exist_ok=True)
    (run.root / "step-00000001.partial").write_text("a user's own")


def test_a_file_in_the_place_of_a_half_written_checkpoint_is_set_aside(config, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    (result,) = run_ranks(1, prepared, config, str(root), file_in_the_place_of_a_half_written_one)
    place = root / "step-00000001.partial"
    line = f"{place} is no folder; set aside as {place.name}.not-ours"
    assert result == (1, [line], ["step-00000001"])
    assert (root / f"{place.name}.not-ours").read_text() == "a user's own"


def test_the_need_for_space_is_that_of_the_files(config, tmp_path):
    (need, size), _ = run_ranks(2, sizes, config, str(tmp_path / "run" / "checkpoints"))
    assert need <= size <= need + 100_000  # headers, of a model of 0.5 MB


def sizes(shard, config: Config, root: str) -> tuple[int, int]:
    run = Run(config, shard, Path(root), in_background=False)
    run.change_weights()
    run.saver.save()
    return run.engine.state_bytes(False), sum(f.stat().st_size for f in Path(root).rglob("*.pt"))


OWNER = "start 2 of the run (process 7 on node3) has taken the folder over"


def of_an_earlier_start(shard, config: Config, root: str) -> Any:
    run = Run(config, shard, Path(root), in_background=True, check_owner=lambda: OWNER)
    run.change_weights()
    run.saver.save()
    run.saver.finish()
    return run.lines, [path.name for path in run.root.iterdir()]


def test_a_writer_of_an_earlier_start_cannot_commit(config, tmp_path):
    for lines, found in run_ranks(2, of_an_earlier_start, config, str(tmp_path / "run" / "checkpoints")):
        assert found == []
        assert lines == [f"no checkpoint of step 1: rank 0: {OWNER}"]


def in_steps(shard, config: Config, root: str) -> Any:
    """Rank 1 writes slowly; what `last_step` is while the steps go on."""
    run = Run(config, shard, Path(root), in_background=True)
    gate, save = threading.Event(), torch.save

    def slow(*args: Any) -> None:
        gate.wait()
        save(*args)

    with pytest.MonkeyPatch.context() as patch:
        if shard.rank == 1:
            patch.setattr(torch, "save", slow)
        run.change_weights()
        run.saver.save()
        seen = []
        for step in range(40):
            if step == 3:
                gate.set()
            run.saver.agree(0, False)
            seen.append(run.saver.last_step)
            run.change_weights()
            if seen[-1] is not None:
                break
            if step > 3:
                threading.Event().wait(0.1)
        run.saver.finish()
    return seen, checkpoints_in(run.root)[0].name


def test_steps_go_on_while_a_rank_writes_and_all_agree_on_the_commit(config, tmp_path):
    (seen, name), other = run_ranks(2, in_steps, config, str(tmp_path / "run" / "checkpoints"))
    assert seen[:4] == [None] * 4 and seen[-1] == 1 and name == "step-00000001"
    assert other == (seen, name)


def asked(shard) -> Any:
    agreement = Agreement()
    alone = agreement.on(module.Told(stop=shard.rank * 15))
    nothing = agreement.on(module.Told())
    return alone, nothing


def test_what_one_rank_says_all_hear():
    assert run_ranks(2, asked) == [(module.Told(stop=15), module.Told())] * 2


def loaded_state(shard, config: Config) -> Any:
    root = Path(config.output_dir) / "checkpoints"
    chosen = choose(root, {}, shard)
    assert chosen is not None
    engine = start_engine(config, load_tokenizer(config.model), training=True)
    return load(engine, chosen)


def test_the_state_is_loaded_with_the_weights(saved_twice):
    one, two = run_ranks(2, loaded_state, saved_twice)
    assert one == two == read(checkpoints_in(Path(saved_twice.output_dir) / "checkpoints")[0]).state
    assert (one.step, one.consumed, one.evaluated_step) == (4, 32, 4)


def test_nothing_else_is_left_in_a_checkpoint(saved_twice):
    """No script, no pointer: files that are named in the manifest, and the manifest."""
    for folder in checkpoints_in(Path(saved_twice.output_dir) / "checkpoints"):
        assert {path.name for path in folder.iterdir()} == {*read(folder).files, "manifest.json"}
        assert os.listdir(folder.parent) and not (folder.parent / "latest").exists()
