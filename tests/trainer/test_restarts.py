"""Starts by a launcher that lead nowhere are counted; those by hand, and those that come further, are not."""

from __future__ import annotations

import pytest

from madpo.trainer.restarts import COUNTS, MOST, STARTS, no_progress


@pytest.fixture
def restarted(monkeypatch):
    """Say how often the launcher has started the job again."""
    for name in COUNTS:
        monkeypatch.delenv(name, raising=False)
    return lambda name, count: monkeypatch.setenv(name, str(count))


@pytest.mark.parametrize("name", COUNTS)
def test_the_start_after_three_at_one_step_ends(tmp_path, restarted, name):
    for count in range(MOST):
        restarted(name, count)
        assert no_progress(tmp_path, 20) is None
    restarted(name, MOST)
    for _ in range(2):
        assert "3 times at step 20" in (no_progress(tmp_path, 20) or "")


def test_a_run_that_comes_further_may_be_started_as_often_as_it_takes(tmp_path, restarted):
    for count in range(20):
        restarted("SLURM_RESTART_COUNT", count)
        assert no_progress(tmp_path, 10 * (count // MOST)) is None


def test_a_start_by_hand_counts_anew(tmp_path, restarted):
    restarted("TORCHELASTIC_RESTART_COUNT", 1)
    for _ in range(MOST):
        assert no_progress(tmp_path, 5) is None
    assert no_progress(tmp_path, 5) is not None
    restarted("TORCHELASTIC_RESTART_COUNT", 0)
    for _ in range(2 * MOST):
        assert no_progress(tmp_path, 5) is None


@pytest.mark.parametrize("content", ["", "[1, 2", "7", "\0", "[[5], {}]"])
def test_a_file_that_is_damaged_counts_anew(tmp_path, restarted, content):
    restarted("SLURM_RESTART_COUNT", 9)
    (tmp_path / STARTS).write_text(content)
    assert no_progress(tmp_path, 5) is None


def test_a_start_that_cannot_be_noted_goes_on(tmp_path, restarted):
    (tmp_path / STARTS).mkdir()
    restarted("SLURM_RESTART_COUNT", 9)
    assert no_progress(tmp_path, 5) is None
