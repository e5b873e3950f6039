"""Which folders below `checkpoints/` are taken for what, and which are deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from madpo.trainer.checkpoints import folders
from madpo.trainer.checkpoints.folders import MANIFEST, checkpoints_in, name_of, newest_checkpoint


def make(root: Path, name: str, committed: bool = True) -> Path:
    (root / name).mkdir(parents=True)
    (root / name / "shard").write_text("content")
    if committed:
        (root / name / MANIFEST).write_text("{}")
    return root / name


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_only_folders_that_are_called_as_checkpoints_are_count(tmp_path):
    for step in (2, 10, 4):
        make(tmp_path, name_of(step))
    for name in ("step-00000011.partial", "step-00000012.damaged", "step-00000013.mine", "step-x", "latest"):
        make(tmp_path, name)
    (tmp_path / "step-00000020").write_text("a file")
    assert [path.name for path in checkpoints_in(tmp_path)] == [name_of(step) for step in (10, 4, 2)]
    assert newest_checkpoint(tmp_path) == tmp_path / name_of(10)
    assert checkpoints_in(tmp_path / "nowhere") == [] and newest_checkpoint(tmp_path / "nowhere") is None


def test_links_count_and_are_never_deleted(tmp_path):
    """Of checkpoints that were moved to another disk, also if it is away."""
    root = tmp_path / "checkpoints"
    for step in (3, 4):
        make(root, name_of(step))
    (root / name_of(2)).symlink_to(make(tmp_path, "moved"))
    (root / name_of(1)).symlink_to(tmp_path / "away")
    assert [path.name for path in checkpoints_in(root)] == [name_of(step) for step in (4, 3, 2, 1)]
    folders.remove_old(root, 4, 1, None)
    assert names(root) == [name_of(step) for step in (1, 2, 4)] and (tmp_path / "moved" / MANIFEST).is_file()


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_newest_are_kept(tmp_path, keep):
    for step in (2, 4, 6, 10, 100):
        make(tmp_path, name_of(step))
    folders.remove_old(tmp_path, 100, keep, None)
    assert names(tmp_path) == [name_of(step) for step in (2, 4, 6, 10, 100)[-keep:]]


def test_those_of_every_so_many_steps_are_kept_for_good(tmp_path):
    for step in range(1, 9):
        make(tmp_path, name_of(step))
    folders.remove_old(tmp_path, 8, 1, 3)
    assert names(tmp_path) == [name_of(step) for step in (3, 6, 8)]


def test_what_is_not_ours_is_neither_counted_nor_deleted(tmp_path):
    """A user's copy, a link, a folder without a manifest; and later steps, of a run that was cut off."""
    for step in (1, 2, 9):
        make(tmp_path, name_of(step))
    make(tmp_path, "step-00000001.mine")
    make(tmp_path, name_of(0), committed=False)
    (tmp_path / "step-00000000.link").symlink_to(tmp_path / name_of(1))
    before = names(tmp_path)
    folders.remove_old(tmp_path, 2, 1, None)
    assert names(tmp_path) == [name for name in before if name != name_of(1)]


def test_half_written_ones_are_removed_and_nothing_else(tmp_path):
    make(tmp_path, name_of(1))
    make(tmp_path, "step-00000002.partial", committed=False)
    make(tmp_path, "step-mine.partial")
    make(tmp_path, "step-00000003.damaged")
    assert folders.remove_partial(tmp_path) == ["step-00000002.partial"]
    assert names(tmp_path) == [name_of(1), "step-00000003.damaged", "step-mine.partial"]


def test_a_damaged_one_never_takes_the_place_of_another(tmp_path):
    for expected in ("step-00000001.damaged", "step-00000001.damaged-2", "step-00000001.damaged-3"):
        assert folders.set_aside(make(tmp_path, name_of(1))).name == expected
    assert [path.name for path in folders.damaged_in(tmp_path)] == names(tmp_path)
