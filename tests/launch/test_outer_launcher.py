"""The command notices when a launcher has started it, and hands nothing of that launcher on to its ranks."""

from __future__ import annotations

import os

import pytest
from harness import make_config

from madpo.launch import local
from madpo.launch.outer_launcher import COUNTS, NUMBERS, check_alone, without_launcher
from madpo.trainer.errors import UserError


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> None:
    for name in (*COUNTS, *NUMBERS):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", COUNTS)
def test_a_command_that_is_started_several_times_is_refused_before_any_rank(monkeypatch, tmp_path, name):
    config = make_config(tmp_path, {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d"}})
    monkeypatch.setenv(name, "2")
    for variables in ({}, {"RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}):
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        with pytest.raises(UserError, match=rf"^{name} is 2: .*-m madpo\.launch\.worker CONFIG"):
            local.run("train", "no such config", [], config)


@pytest.mark.parametrize("name", NUMBERS)
def test_one_that_is_not_the_first_of_several_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(UserError, match=rf"^{name} is 1: a launcher starts this command several times"):
        check_alone()
    monkeypatch.setenv(name, "0")
    check_alone()


@pytest.mark.parametrize("value", ["1", "", "0"])
def test_a_single_process_is_not(monkeypatch, value):
    for name in COUNTS:
        monkeypatch.setenv(name, value)
    check_alone()


def test_ranks_see_nothing_of_an_outer_launcher(monkeypatch):
    """Torch's store would otherwise wait for a server that nobody is."""
    outer = {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "a",
        "PET_NNODES": "2",
        "GROUP_RANK": "1",
        "ROLE_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.1",
        "RANK": "0",
        "NODE_RANK": "1",
    }
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    assert without_launcher(outer | {"HOME": "h"}) == {"HOME": "h"}
    for ranks in (1, 2):
        env = local.environment(ranks, 1)
        left = {name for name in outer if env.get(name) == outer[name]}
        assert left == {"RANK"}, "rank 0, by our own word; each rank gets its own number"
        assert env["PATH"] == os.environ["PATH"]
    assert local.environment(1, 1)["MASTER_ADDR"] == "127.0.0.1"
