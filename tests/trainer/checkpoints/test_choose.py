"""Damage of every kind in the newest checkpoint of a run of two ranks: the older one is taken, or none."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from small_runs import evaluate_only, records, train

from madpo.trainer.checkpoints.choose import choose
from madpo.trainer.checkpoints.folders import MANIFEST, checkpoints_in
from madpo.trainer.checkpoints.manifest import Manifest, read
from madpo.trainer.config.schema import Config
from madpo.trainer.errors import CheckpointError, UserError
from madpo.trainer.files import Entry, hash_of_file
from madpo.trainer.zero3.shard_files import load_shard

pytestmark = pytest.mark.ranks
FIRST, SECOND = "step-00000002", "step-00000004"
OPTIMIZER = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"


def flip(path: Path, place: float) -> None:
    """Flip one bit at a place in the file, a fraction of its length."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 1
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    aside = one.rename(one.with_name("aside"))
    other.rename(one)
    aside.rename(other)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "optimiser truncated": (lambda c: os.truncate(c / OPTIMIZER.format(1), 999), "rank_1.*has 999 bytes"),
    "model empty": (lambda c: (c / MODEL.format(0)).write_bytes(b""), "rank_0.*model_states.pt has 0 bytes"),
    "optimiser of zeros": (
        lambda c: (c / OPTIMIZER.format(0)).write_bytes(bytes((c / OPTIMIZER.format(0)).stat().st_size)),
        "rank_0.*optim_states.pt has changed",
    ),
    "a bit of a weight": (
        lambda c: flip(c / OPTIMIZER.format(1), 0.6),
        "rank_1.*optim_states.pt has changed",
    ),
    "a bit of a header": (lambda c: flip(c / MODEL.format(1), 0.1), "rank_1.*model_states.pt has changed"),
    "optimiser deleted": (lambda c: (c / OPTIMIZER.format(1)).unlink(), "rank_1.*optim_states.pt is missing"),
    "model deleted": (lambda c: (c / MODEL.format(0)).unlink(), "rank_0.*model_states.pt is missing"),
    "shards of the ranks swapped": (
        lambda c: swap(c / OPTIMIZER.format(0), c / OPTIMIZER.format(1)),
        "optim_states.pt has changed",
    ),
    "a shard of another step": (
        lambda c: shutil.copy(c.with_name(FIRST) / OPTIMIZER.format(1), c / OPTIMIZER.format(1)),
        "rank_1.*optim_states.pt has",
    ),
    "no manifest": (lambda c: (c / MANIFEST).unlink(), "has no manifest.json"),
    "a manifest that is a pipe": (
        lambda c: ((c / MANIFEST).unlink(), os.mkfifo(c / MANIFEST)),
        "manifest.json is no file",
    ),
    "the manifest of another step": (
        lambda c: shutil.copy(c.with_name(FIRST) / MANIFEST, c / MANIFEST),
        "it is of step 2",
    ),
    "an empty folder": (lambda c: (shutil.rmtree(c), c.mkdir()), "has no manifest.json"),
}


def choices(shard, roots: list[str], identity: dict[str, Any]) -> list[str]:
    """The name of what is chosen below each root, or the error."""
    found = []
    for root in roots:
        try:
            chosen = choose(Path(root), identity, shard, may_set_aside=True)
            found.append(chosen.folder.name if chosen else "none")
        except UserError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def copy_of(run: Config, tmp_path: Path, name: str) -> Path:
    root = tmp_path / name / "checkpoints"
    shutil.copytree(Path(run.output_dir) / "checkpoints", root)
    return root


def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_older_one_is_taken(saved_twice, tmp_path, capfd):
    roots = {name: copy_of(saved_twice, tmp_path, name) for name in DAMAGE}
    for name, root in roots.items():
        DAMAGE[name][0](root / SECOND)
    capfd.readouterr()
    found = run_ranks(2, choices, [str(root) for root in roots.values()], {})
    assert found == [[FIRST] * len(DAMAGE)] * 2
    lines = capfd.readouterr().out.splitlines()
    for line, (name, root) in zip(lines, roots.items(), strict=True):
        assert line.startswith(f"checkpoint {root / SECOND} is not used: "), name
        assert line.endswith(f"; set aside as {SECOND}.damaged"), name
        assert re.search(DAMAGE[name][1], line), name
        assert sorted(path.name for path in root.iterdir()) == [FIRST, f"{SECOND}.damaged"]


def test_without_a_whole_one_nothing_is_begun_anew(saved_twice, tmp_path):
    """Both damaged; both set aside before; nothing there yet; and only one that was never finished."""
    both, aside, new, unfinished = (copy_of(saved_twice, tmp_path, name) for name in "abcd")
    for folder in checkpoints_in(both):
        (folder / MANIFEST).unlink()
    for folder in checkpoints_in(aside):
        folder.rename(folder.with_name(f"{folder.name}.damaged"))
    shutil.rmtree(new)
    shutil.rmtree(unfinished / SECOND)
    (unfinished / FIRST).rename(unfinished / f"{FIRST}.partial")
    found, again = run_ranks(2, choices, [str(root) for root in (both, aside, new, unfinished)], {})
    assert found == again
    assert found[0].startswith(f"CheckpointError: {both}: no sound checkpoint to continue from:\n  {SECOND}")
    assert f"\n  {FIRST}: has no manifest.json\n" in found[0]
    assert f"{SECOND}.damaged: set aside before" in found[1]
    assert found[2:] == ["none", "none"]
    assert len(checkpoints_in(both)) == 2, "what is refused stays where it is"


def test_moved_checkpoints_are_followed_and_a_folder_that_is_away_is_no_empty_one(saved_twice, tmp_path):
    moved, away, gone, file = (copy_of(saved_twice, tmp_path, name) for name in "abcd")
    for step in (FIRST, SECOND):
        (moved / step).rename(tmp_path / step)
        (moved / step).symlink_to(tmp_path / step)
        shutil.rmtree(away / step)
        (away / step).symlink_to(tmp_path / "away")
    for root in (gone, file):
        shutil.rmtree(root)
    gone.symlink_to(tmp_path / "away")
    file.write_text("")
    found, again = run_ranks(2, choices, [str(root) for root in (moved, away, gone, file)], {})
    assert found == again and found[0] == SECOND
    assert found[1].startswith(
        f"CheckpointError: {away}: no sound checkpoint to continue from:\n  {SECOND}: has"
    )
    then = "bring the folder back, or train with --fresh"
    assert found[2].startswith(
        f"CheckpointError: {gone} is a link to {tmp_path}/away, which is not there; {then}"
    )
    assert found[3].startswith(f"CheckpointError: {file} is a file; {then}")


def test_a_checkpoint_of_another_run_is_refused_and_stays(saved_twice, tmp_path):
    root = copy_of(saved_twice, tmp_path, "run")
    ((found,), _) = run_ranks(2, choices, [str(root)], {"seed": 1})
    assert found.startswith(f"UserError: {root / SECOND} was made with other settings:\n  seed: 42 there, 1")
    assert len(checkpoints_in(root)) == 2


def elsewhere(shard, root: str) -> Any:
    """Rank 1 sees another folder."""
    return choose(Path(root) if shard.is_main else Path(root) / "no", {}, shard)


def test_ranks_that_see_different_checkpoints_are_refused(saved_twice, tmp_path):
    root = copy_of(saved_twice, tmp_path, "run")
    with pytest.raises(AssertionError, match=rf"rank 0 sees checkpoints {SECOND}, .*, this rank sees none"):
        run_ranks(2, elsewhere, str(root))


def test_a_run_goes_on_from_the_older_checkpoint_to_the_bits_of_one_that_was_not_damaged(
    saved_twice, tmp_path, capfd
):
    run = saved_twice.model_copy(update={"output_dir": str(tmp_path / "run")})
    shutil.copytree(saved_twice.output_dir, run.output_dir)
    checkpoints = Path(run.output_dir) / "checkpoints"
    flip(checkpoints / SECOND / OPTIMIZER.format(0), 0.5)
    run_ranks(2, train, run)
    out = capfd.readouterr().out
    assert "  steps 3 to 4 are trained again: there is no sound checkpoint of them\n" in out
    whole = Path(saved_twice.output_dir) / "checkpoints" / SECOND
    assert read(checkpoints / SECOND).files == read(whole).files
    assert [x["step"] for x in records(Path(run.output_dir)) if "loss" in x] == [1, 2, 3, 4]
    assert (checkpoints / f"{SECOND}.damaged").is_dir()


def test_evaluation_passes_over_a_damaged_one_and_moves_nothing(saved_twice, tmp_path, capfd):
    run = saved_twice.model_copy(update={"output_dir": str(tmp_path / "run")})
    shutil.copytree(saved_twice.output_dir, run.output_dir)
    damaged = Path(run.output_dir) / "checkpoints" / SECOND
    (damaged / MANIFEST).write_text("{}")
    run_ranks(2, evaluate_only, run)
    out = capfd.readouterr().out
    assert f"checkpoint {damaged} is not used: manifest.json is of no format known here\n" in out
    assert damaged.is_dir() and FIRST in out


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", [OPTIMIZER, MODEL])
def test_code_in_a_shard_is_not_run_even_if_its_checksum_is_right(saved_twice, tmp_path, kind):
    run = saved_twice.model_copy(update={"output_dir": str(tmp_path / "run")})
    shutil.copytree(saved_twice.output_dir, run.output_dir)
    folder = Path(run.output_dir) / "checkpoints" / SECOND
    shard = folder / kind.format(0)
    torch.save({"ds_version": Planted(tmp_path / "ran")}, shard)
    with pytest.raises(pickle.UnpicklingError):  # the file is what it is meant to be
        torch.load(shard, weights_only=True)
    manifest = read(folder)
    entry = Entry(shard.stat().st_size, hash_of_file(shard))
    Manifest(**{**vars(manifest), "files": {**manifest.files, shard.name: entry}}).write(folder)
    with pytest.raises(CheckpointError, match="holds more than weights"):
        load_shard(shard)
    with pytest.raises(AssertionError, match=r"optim_states\.pt|model_states\.pt"):
        run_ranks(2, evaluate_only, run)
    assert not (tmp_path / "ran").exists()
