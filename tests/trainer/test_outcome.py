"""How a start has ended, written and read back, or lost in a way that nobody takes for success."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from madpo.trainer import outcome
from madpo.trainer.errors import Exit, UserError


def test_what_was_written_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv(outcome.START, "abc")
    monkeypatch.setenv("RANK", "3")
    outcome.write(tmp_path, Exit.DATA, "error: train.jsonl:7", "train")
    found = outcome.read(tmp_path)
    assert found is not None
    assert (found.status, found.text, found.task, found.start, found.rank) == (
        *(3, "error: train.jsonl:7", "train", "abc", 3),
    )
    outcome.remove(tmp_path)
    assert outcome.read(tmp_path) is None
    outcome.remove(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": 0}', '{"status": 0, "more": 1}', "\xff"])
def test_what_cannot_be_read_is_no_outcome(tmp_path, content):
    (tmp_path / outcome.NAME).write_text(content)
    assert outcome.read(tmp_path) is None


def test_a_folder_that_cannot_be_written_to_costs_nothing(tmp_path):
    outcome.write(tmp_path / "nowhere", Exit.DONE, "", "train")
    assert outcome.read(tmp_path / "nowhere") is None


def test_starts_have_names_of_their_own():
    assert len({outcome.new_start() for _ in range(100)}) == 100


def test_a_folder_in_the_place_of_the_file_is_refused_at_the_start(tmp_path):
    (tmp_path / outcome.NAME).mkdir()
    with pytest.raises(UserError, match=r"outcome\.json cannot be replaced \(Is a directory\); move it away"):
        outcome.remove(tmp_path)


def test_one_rank_is_the_first_to_fail_also_on_a_disk_that_takes_no_further_file(tmp_path, monkeypatch):
    monkeypatch.setenv(outcome.START, "abc")
    outcome.remove(tmp_path)

    def full(path: Path, flags: int) -> int:
        if path.exists() and flags & os.O_EXCL:
            raise FileExistsError
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(outcome.os, "open", full)
    assert [outcome.is_first_to_fail(tmp_path) for _ in range(3)] == [True, False, False]
    assert outcome.has_failed(tmp_path)
