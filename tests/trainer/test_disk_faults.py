"""Real errors of writing, in the forms of several libraries, end in one line with the place and the cause."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import datasets
import pytest
from harness import run_ranks, save_model, write_pairs
from small_runs import changed

from madpo.launch import worker
from madpo.trainer.config.schema import Config, dump
from madpo.trainer.disk_faults import explained
from madpo.trainer.errors import UserError
from madpo.trainer.files import write_atomically


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    model = save_model(tmp_path / "start", tokenizer_folder, seed=1)
    data = write_pairs(tmp_path / "pairs" / "train.jsonl", 24)
    return Config.model_validate(
        {
            "output_dir": str(tmp_path / "run"),
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(data), "max_length": 64, "cache_dir": str(tmp_path / "cache")},
            "objective": {"loss_type": "dpo"},
            "train": {"bf16": False, "max_steps": 1, "global_batch_size": 8, "micro_batch_tokens": 256},
        }
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device here")
def test_a_full_disk_without_a_name_names_both_folders_and_their_room(config, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError) as caught, explained(config), open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    begin, rest = str(caught.value).split(" GB free)")
    run, room = begin.rsplit(" (", 1)
    assert run == f"output_dir {tmp_path}/run"
    assert float(room.replace(",", "")) == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, abs=1)
    assert rest == (
        f" or data.cache_dir {tmp_path}/cache: cannot be written to (No space left on device); make room "
        "there, or use another folder"
    )


def test_what_is_no_fault_of_the_disk_stays_what_it_is(config):
    for error in (OSError(2, "No such file", "/elsewhere"), ValueError("x"), RuntimeError("os errors")):
        with pytest.raises(type(error)) as caught, explained(config):
            raise error
        assert caught.value is error


def test_a_folder_that_was_removed_is_named(config):
    with pytest.raises(UserError, match=r"^output_dir: .*/run was removed while the r"), explained(config):
        (Path(config.output_dir) / "model.partial").mkdir()


IN_THE_WAY: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (
        lambda run: write_atomically(run / "taken", "x"),
        "Is a directory: a folder is in the place",
    ),
    "a file": (lambda run: (run / "file").mkdir(), "File exists: a file is in the place of this folder"),
    "a file above": (
        lambda run: (run / "file" / "x").mkdir(),
        "Not a directory: a file is in the place of a",
    ),
    "a circle": (
        lambda run: (run / "circle").write_text("x"),
        "Too many levels of symbolic links: remove the",
    ),
}


@pytest.mark.parametrize("name", IN_THE_WAY)
def test_what_is_in_the_way_of_a_file_of_the_run_is_named(config, name):
    run = Path(config.output_dir)
    (run / "taken").mkdir(parents=True)
    (run / "file").touch()
    (run / "circle").symlink_to(run / "circle")
    act, words = IN_THE_WAY[name]
    with pytest.raises(UserError, match=rf"^{run}/\S+: {words}"), explained(config):
        act(run)
    with pytest.raises(OSError, match="Is a directory"), explained(config):
        (run.parent / "start").write_text("no file of the run")


def kill_itself(row):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_of_tokenising_is_one_line(config):
    config = changed(config, data={"dataset_num_proc": 2})
    rows = datasets.Dataset.from_dict({"x": [1, 2, 3, 4]})
    with (
        pytest.raises(
            UserError, match=r"^data.dataset_num_proc: one of the 2 processes that tokenise was kil"
        ),
        explained(config),
    ):
        rows.map(kill_itself, num_proc=2)


def limited(shard, size: int, output: Path, *arguments: str) -> int:
    """The exit status of a rank that may write no file of more bytes."""
    with output.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return worker.main(list(arguments))


@pytest.mark.ranks
@pytest.mark.parametrize(
    "size", [pytest.param(4_000, id="cache"), pytest.param(30_000, id="checkpoint", marks=pytest.mark.slow)]
)
def test_a_limit_on_the_size_of_files_is_one_line(config, tmp_path, size):
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    (status,) = run_ranks(1, limited, size, tmp_path / "printed", str(path))
    printed = (tmp_path / "printed").read_text()
    assert status != 0 and "Traceback" not in printed, printed
    checkpoint = r"no checkpoint of step 1: rank 0: /\S+: File too large$"
    assert re.search(rf"{checkpoint}|File too large\); raise .* \(ulimit -f\)$", printed, re.MULTILINE), (
        printed
    )
