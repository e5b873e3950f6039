"""Ranks that do not mean one run are told so before a model is loaded, in one line that names the hosts."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from patience import patient

from madpo.trainer import handshake
from madpo.trainer.config.schema import Config, load
from madpo.trainer.dist import free_port
from madpo.trainer.errors import Exit
from madpo.trainer.handshake import Facts, clock_notes, fault

VERSIONS = {"madpo": "1.0", "torch": "2.13"}
SECTIONS = {"data": "a", "train": "b"}


def written(folder: Path, more: str = "") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "c.yaml"
    path.write_text(
        f"model: {{model_name_or_path: {folder}}}\ndata: {{dataset_name: x.jsonl, cache_dir: cache}}\n"
        f"objective: {{loss_type: dpo}}\noutput_dir: run\ntrain: {{global_batch_size: 64}}\n{more}"
    )
    return str(path)


@pytest.fixture
def config(tmp_path) -> Config:
    return load(written(tmp_path), [], "train")


def ranks(hosts: int, each: int, **more: Any) -> list[Facts]:
    alike = Facts(0, "", 0, versions=VERSIONS, config=SECTIONS)
    return [replace(alike, rank=n, host=f"host{n // each}", **more) for n in range(hosts * each)]


def but(facts: Sequence[Facts], at: Sequence[int], **more: Any) -> list[Facts]:
    """The facts, with others on some ranks."""
    return [replace(fact, **more) if fact.rank in at else fact for fact in facts]


def test_ranks_that_are_alike_go_on(config):
    assert fault(ranks(4, 8), config, False) == (0, "")
    assert fault(ranks(4, 8, gpus=8), config, False) == (0, "")


def test_a_problem_of_some_hosts_names_them_and_one_of_all_does_not(config):
    missing: dict[str, Any] = {"problem": "c.yaml: no such file", "status": 2}
    some = fault(but(ranks(4, 2), [2, 3, 6], **missing), config, False)
    assert some == (2, "host1, host3 (ranks 2-3, 6): c.yaml: no such file")
    assert fault(but(ranks(4, 2), range(8), **missing), config, False) == (2, "c.yaml: no such file")
    many = fault(but(ranks(128, 8), range(8, 1024), **missing), config, False)[1]
    assert many == "host1, host2, host3 and 124 more (ranks 8-1023): c.yaml: no such file"


def test_another_version_and_another_config_are_named(config):
    status, text = fault(but(ranks(2, 2), [3], versions=VERSIONS | {"torch": "2.12"}), config, False)
    assert status == Exit.USAGE
    assert text.startswith("host1 (rank 3): torch 2.12, and on host0 (rank 0) 2.13;")
    text = fault(but(ranks(2, 2), [2, 3], config=SECTIONS | {"train": "c"}), config, False)[1]
    assert text.startswith("host1 (ranks 2-3): another config than on host0 (rank 0), in train;")


@pytest.mark.parametrize("key, folder", [("output_dir", "run"), ("data.cache_dir", "cache")])
def test_a_folder_that_is_not_shared_is_named(config, key, folder):
    text = fault(but(ranks(2, 2), [2, 3], unseen=[key]), config, False)[1]
    assert text.startswith(f"{key}: host1 (ranks 2-3): {folder} is not the folder of that name on host0")


GPUS: dict[str, tuple[list[Facts], str]] = {
    "one for each": (ranks(2, 4, gpus=4), ""),
    "each is shown its own": ([replace(f, visible=str(f.rank % 4)) for f in ranks(2, 4, gpus=1)], ""),
    "all but one idle": (ranks(2, 1, gpus=8), "host0: 1 rank for 8 GPUs: 7 would be idle"),
    "more ranks": (ranks(2, 4, gpus=2), "host0: 4 ranks for 2 GPUs; start as many"),
    "a rank that sees none": (but(ranks(2, 2, gpus=2), [3], gpus=0), "host1: 2 ranks for 2 GPUs; start"),
    "a host that has none": (but(ranks(2, 2, gpus=2), [2, 3], gpus=0), "host1: no GPU, and host0 has 2"),
}


@pytest.mark.parametrize("name", GPUS)
def test_ranks_and_gpus_of_a_host(config, name):
    facts, message = GPUS[name]
    text = fault(facts, config, False)[1]
    assert text.startswith(message) and bool(text) is bool(message)


def test_gpus_that_the_user_leaves_idle_are_the_users(config):
    assert fault(ranks(1, 2, gpus=8), config, True) == (0, "")


def test_ranks_without_work_are_counted(config):
    text = fault(ranks(128, 8), config, False)[1]
    assert text.startswith("train.global_batch_size: 64 groups a step leave 960 of 1,024 ranks without work;")
    assert text.endswith("raise it to 1,024 or more, or start fewer ranks")
    train = config.train.model_copy(update={"sequence_parallel_size": 16})
    assert fault(ranks(128, 8), config.model_copy(update={"train": train}), False) == (0, "")


def test_a_clock_that_is_wrong_is_told_with_what_is_certain():
    """Rank 0 looked at 100 and at 130; a rank may have spoken at any time between."""
    times = (110.0, 90.0, 170.0, 132.0)
    facts = [replace(fact, time=time) for fact, time in zip(ranks(4, 1), times, strict=True)]
    first, second = clock_notes(facts, 100.0, 130.0)
    assert first.startswith("the clock of host1 is 10 s or more behind that of host0")
    assert second.startswith("the clock of host2 is 40 s or more ahead of that of host0")


def test_what_a_rank_says_is_short(config):
    """Rank 0 reads it of 1,024 ranks."""
    assert len(json.dumps(asdict(handshake._facts(0, config, None)))) < 1500


RANK = """
import os, sys, time
from madpo.trainer import handshake
from madpo.trainer.config.schema import load
from madpo.trainer.errors import UserError

handshake.SECONDS_TO_SEE, said = float(os.environ.get("SEES", "1")), []
def prepare(config):
    if os.environ.get("READONLY"):
        raise UserError("output_dir: nothing can be written")
    assert os.environ["RANK"] == "0"
    open(f"{config.output_dir}/prepared", "w").close()

try:
    config = load(sys.argv[1], sys.argv[2:], "train")
except UserError as error:
    config = error
try:
    start = handshake.shake_hands(config, f"of-{os.environ['RANK']}", False, said.append, prepare)
    assert os.path.exists(f"{config.output_dir}/prepared")
    print("ok", start.name)
    if "STAYS" in os.environ:  # until its input is closed
        sys.stdin.read()
except UserError as error:
    assert said == [str(error)] * (error.is_agreed and os.environ["RANK"] == "0")
    print(int(error.status), error.is_agreed, error)
"""


def together(folder: Path, *starts: dict[str, str], more: Sequence[str] = ()) -> list[str]:
    """What ranks say that start at one time. A start has variables of a rank, its `config` and its `cwd`."""
    port = str(free_port())
    processes = []
    for start in starts:
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **start}
        cwd = folder / start.get("cwd", ".")
        cwd.mkdir(exist_ok=True)
        line = [sys.executable, "-c", RANK, start.get("config", str(folder / "c.yaml")), *more]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(line, env=env, cwd=cwd, stdin=pipe, stdout=pipe, text=True))
    try:  # the first one last, whose input is open until then
        said = [process.communicate(timeout=patient(60))[0].strip() for process in reversed(processes)]
        return said[::-1]
    finally:
        for process in processes:
            process.kill()


def rank(number: int, ranks: int = 2, **more: str) -> dict[str, str]:
    return {"RANK": str(number), "WORLD_SIZE": str(ranks), **more}


def test_two_ranks_agree_on_a_name_and_leave_nothing_behind(tmp_path):
    written(tmp_path)
    assert together(tmp_path, rank(0), rank(1)) == ["ok of-0"] * 2
    assert (tmp_path / "run").is_dir() and not list(tmp_path.glob("*/.start-*"))


def test_a_config_that_one_host_lacks_ends_both(tmp_path):
    written(tmp_path)
    first, second = together(tmp_path, rank(0), rank(1, config="nowhere.yaml"))
    assert first == second and first.startswith("2 True ") and "(rank 1): nowhere.yaml: no such" in first


def test_a_config_that_all_lack_is_told_without_names(tmp_path):
    first, second = together(tmp_path, *(rank(n, config="nowhere.yaml") for n in (0, 1)))
    assert first == second and first.startswith("2 True nowhere.yaml: no such")


@pytest.mark.parametrize("number", [1, 2])
def test_what_rank_0_cannot_prepare_ends_all_ranks_with_its_words(tmp_path, number):
    written(tmp_path)
    said = together(tmp_path, *(rank(n, number, READONLY="yes") for n in range(number)))
    assert said == [f"2 {number > 1} output_dir: nothing can be written"] * number


def test_a_folder_that_rank_0_cannot_write_to_is_waited_for_by_nobody(tmp_path):
    written(tmp_path)
    said = together(tmp_path, *(rank(n, SEES="1000") for n in (0, 1)), more=["output_dir=/proc"])
    assert said[0] == said[1] and said[0].startswith("2 True output_dir: /proc cannot be written to")


def test_a_token_that_cannot_be_written_is_a_problem_of_the_folder(config, monkeypatch):
    """As on a disk that fills up, after it was found to be writable."""

    def full(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(handshake, "write_atomically", full)
    with handshake._tokens(config, "start") as problem:
        assert "cannot be written (No space left on device)" in str(problem)


def test_a_folder_of_each_hosts_own_is_refused(tmp_path):
    """A relative path is two folders in two working directories, as on two private disks."""
    written(tmp_path)
    first, second = together(tmp_path, rank(0, cwd="a"), rank(1, cwd="b"))
    assert first == second and first.startswith("2 True output_dir: ")
    assert "(rank 1): run is not the folder of that name on" in first


def test_a_rank_that_does_not_come_is_missed_by_its_number(tmp_path):
    written(tmp_path)
    for text in together(tmp_path, rank(0, 4), rank(2, 4), more=["launch.start_timeout_minutes=0.05"]):
        assert text.startswith(
            "6 True launch.start_timeout_minutes: ranks 1, 3 of 4 did not come within 0.05"
        )


def test_nobody_at_the_address_is_said_by_the_rank_itself(tmp_path):
    written(tmp_path)
    (text,) = together(tmp_path, rank(1), more=["launch.start_timeout_minutes=0.05"])
    assert text.startswith("6 False rank 1 on ") and "found nobody at 127.0.0.1, port " in text


def test_a_stranger_of_another_run_at_the_port_is_noticed(tmp_path):
    """A second rank 1 comes, of another run; whichever is first, nobody trains with the wrong one."""
    written(tmp_path)
    other = written(tmp_path / "other", "seed: 5\n")
    first, *rest = together(tmp_path, rank(0, STAYS="yes"), rank(1), rank(1, config=other))
    outcomes = sorted(text.split()[0] for text in rest)
    if first.startswith("ok"):
        assert first == "ok of-0" and outcomes == ["2", "ok"]
        assert any("two runs meet at one port" in text for text in rest)
    else:  # the rank that found its place taken may come after rank 0 has ended
        assert "another config than on" in first and outcomes[0] == "2" and outcomes[1] in ("2", "6")


def test_a_port_that_somebody_listens_on_is_named(tmp_path):
    written(tmp_path)
    with socket.socket() as sock:
        sock.bind(("", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        (text,) = together(tmp_path, rank(0, MASTER_ADDR=socket.gethostname(), MASTER_PORT=port))
    assert text.startswith("2 False MASTER_PORT: ") and f"cannot listen on port {port}" in text
