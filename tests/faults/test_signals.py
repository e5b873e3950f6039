"""Signals and kills under the real command: the exit status, what is said, and how the run goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from harness import run_ranks
from patience import patient
from real_runs import NOISE, RealRun, real_run
from small_runs import train

from madpo.trainer import heartbeat, outcome
from madpo.trainer.checkpoints.folders import newest_checkpoint, step_of
from madpo.trainer.checkpoints.manifest import read
from madpo.trainer.config.schema import load
from madpo.trainer.errors import Exit
from madpo.trainer.files import Entry
from madpo.trainer.stopping import ENDING

pytestmark = [pytest.mark.launcher, pytest.mark.ranks]
STEPS = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer_folder) -> RealRun:
    """A run of so many steps that it can be stopped in between."""
    folder = tmp_path_factory.mktemp("signals")
    return real_run(folder, tokenizer_folder, max_steps=STEPS, num_train_epochs=1e6, global_batch_size=4)


def step_of_newest(run: RealRun) -> int:
    newest = newest_checkpoint(run.folder / "checkpoints")
    return step_of(newest.name) if newest else 0


def shards(run: RealRun) -> dict[str, Entry]:
    newest = newest_checkpoint(run.folder / "checkpoints")
    assert newest is not None and step_of(newest.name) == STEPS
    return dict(read(newest).files)


STOPPED = r"stopped at step (\d+) of \d+; the last checkpoint is of step (\d+); the same command continues .*"


def check_stopped(run: RealRun, status: int, text: str) -> None:
    """The run has ended in good order, with a checkpoint of the step that it says."""
    assert status == Exit.AGAIN, text
    *lines, last = text.splitlines()
    assert "stopping after this step; Ctrl-C again stops at once" in lines
    found = re.fullmatch(STOPPED, last)
    assert found and found[1] == found[2] == str(step_of_newest(run))
    assert (run.folder / "log.txt").read_text().splitlines()[-1] == last
    assert not [word for word in NOISE if word in text], text
    said = outcome.read(run.folder)
    assert said is not None and (said.status, said.text, said.task) == (Exit.AGAIN, last, "train")
    assert not run.survivors()


@pytest.mark.slow
def test_faults_one_after_another_and_the_run_ends_with_the_bits_of_an_undisturbed_one(run):
    """SIGTERM to the command; kill -9 of a rank; then to the end."""
    process = run.train()
    run.wait_for(lambda: len(run.losses()) >= 3, process)
    process.send_signal(signal.SIGTERM)
    ((status, text),) = run.finish(process)
    check_stopped(run, status, text)

    process = run.train()
    begun = step_of_newest(run)
    run.wait_for(lambda: len(run.losses()) >= begun + 2, process)
    victim = run.ranks()[1]
    victim.kill()
    ((status, text),) = run.finish(process)
    assert status == Exit.LOST_PEER, text
    host = os.uname().nodename
    assert f"\nerror: rank 1 on {host} is gone: killed by SIGKILL; often the kernel, out of memory" in text
    assert "\nerror: rank 0 has lost another rank: " in text and "Traceback" not in text
    assert f"resuming after step {begun} of {STEPS}" in text
    assert step_of_newest(run) == begun and not run.survivors()

    ((status, text),) = run.finish(run.train())
    assert status == Exit.DONE, text
    said = outcome.read(run.folder)
    assert said is not None and said.status == Exit.DONE

    whole = run._replace(folder=run.folder.parent / "whole")
    run_ranks(2, train, load(run.path, [f"output_dir={whole.folder}"]))
    assert shards(run) == shards(whole)


def test_sigterm_stops_a_run_in_good_order_and_the_same_command_ends_it(tmp_path, tokenizer_folder):
    run = real_run(tmp_path, tokenizer_folder, max_steps=STEPS, num_train_epochs=1e6, global_batch_size=4)
    process = run.train()
    run.wait_for(lambda: len(run.losses()) >= 3, process)
    process.send_signal(signal.SIGTERM)
    ((status, text),) = run.finish(process)
    check_stopped(run, status, text)
    run_ranks(2, train, load(run.path))
    assert shards(run)


SIGNALS = [signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("to", ["the command", "rank 0", "rank 1", "all"])
def test_every_signal_to_every_process_stops_the_run_in_good_order(tmp_path, tokenizer_folder, number, to):
    run = real_run(tmp_path, tokenizer_folder, max_steps=100_000, num_train_epochs=1e6)
    process = run.train()
    run.wait_for(lambda: len(run.losses()) >= 2, process)
    targets = {"the command": [process], "all": [process, *run.ranks()]}
    for target in targets.get(to, [run.ranks()[int(to[-1])]] if to[-1].isdigit() else []):
        target.send_signal(number)
    ((status, text),) = run.finish(process)
    assert status == Exit.AGAIN, text
    assert re.search(STOPPED, text) and step_of_newest(run) >= 2 and not run.survivors()


@pytest.mark.slow
def test_ctrl_c_twice_stops_at_once(tmp_path, tokenizer_folder):
    run = real_run(tmp_path, tokenizer_folder, max_steps=100_000, num_train_epochs=1e6)
    process = run.train("train.async_save=true")
    run.wait_for(lambda: len(run.losses()) >= 2, process)
    for rank in run.ranks():  # so that no step ends
        rank.suspend()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    for rank in run.ranks():
        rank.resume()
    ((status, text),) = run.finish(process)
    assert status in (130, Exit.AGAIN) and "Traceback" not in text and not run.survivors()


@pytest.mark.slow
@pytest.mark.parametrize("number", ENDING)
def test_a_signal_to_end_at_once_ends_the_whole_tree_also_where_a_rank_is_frozen(
    tmp_path, tokenizer_folder, number
):
    run = real_run(tmp_path, tokenizer_folder, max_steps=100_000, num_train_epochs=1e6)
    process = run.train()
    run.wait_for(lambda: len(run.losses()) >= 2, process)
    run.ranks()[1].suspend()
    process.send_signal(number)
    ((status, text),) = run.finish(process)
    assert status == 128 + number and not run.survivors()
    assert text.splitlines()[-1] == f"ended at once by {number.name}; the same command starts again"
    assert "Traceback" not in text and "error" not in text


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(tmp_path, tokenizer_folder):
    """As with `madpo train CONFIG | head -1`."""
    run = real_run(tmp_path, tokenizer_folder)
    process = run.train()
    assert process.stdout is not None and process.stdout.readline().startswith("reading ")
    process.stdout.close()
    try:
        assert process.wait(patient(150)) == Exit.DONE
    finally:
        assert run.gone(1)
    log = (run.folder / "log.txt").read_text()
    assert "step 2/2" in log and "Traceback" not in log
    assert (run.folder / "model").is_dir() and (run.folder / "report.html").is_file()
    said = outcome.read(run.folder)
    assert said is not None and said.status == Exit.DONE


@pytest.mark.slow
def test_a_killed_command_leaves_no_rank_and_a_checkpoint(tmp_path, tokenizer_folder):
    run = real_run(tmp_path, tokenizer_folder, max_steps=100_000, num_train_epochs=1e6)
    process = run.train()
    run.wait_for(lambda: len(run.losses()) >= 2, process)
    process.kill()
    assert run.gone()
    process.communicate(timeout=patient(10))
    assert step_of_newest(run) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_rank_is_named_and_the_others_leave_their_stacks(tmp_path, tokenizer_folder, rank):
    run = real_run(tmp_path, tokenizer_folder, max_steps=100_000, num_train_epochs=1e6)
    process = run.train("launch.timeout_minutes=0.3")
    run.wait_for(lambda: len(run.losses()) >= 2, process)
    # What it has said last is what is told of it.
    run.wait_for(lambda: all("step" in beat.place for beat in heartbeat.beats_in(run.folder)), process)
    frozen = run.ranks()[rank]
    frozen.suspend()
    ((status, text),) = run.finish(process)
    assert status == Exit.LOST_PEER
    silent = (
        rf"error: rank {1 - rank} has lost another rank: rank {rank} \(\S+, process {frozen.pid}\) has been "
    )
    assert re.search(silent + r"silent for \d+ s, last in step \d+", text), text
    stacks = (run.folder / "hangs" / f"rank-0000{1 - rank}.txt").read_text()
    assert stacks.startswith(f"rank {1 - rank} has been in step ") and "train_step" in stacks
    ((status, text),) = run.finish(
        run.start(sys.executable, "-m", "madpo.launch.cli", "status", str(run.folder))
    )
    assert status == Exit.LOST_PEER and text.startswith("failed with status 6")


@pytest.mark.slow
def test_a_rank_that_is_killed_while_models_load_is_named(tmp_path, tokenizer_folder):
    run = real_run(tmp_path, tokenizer_folder)
    process = run.train()
    run.wait_for(lambda: len(run.ranks()) == 2 and (run.folder / ".owner.json").exists(), process)
    run.ranks()[0].kill()
    ((status, text),) = run.finish(process)
    assert status == Exit.LOST_PEER and "rank 0 on " in text and "could not be loaded" not in text


def test_a_mistake_is_one_line_and_its_status_the_ranks(run, tmp_path):
    """One that only the ranks can see, and all of them see."""
    command = run.train("data.columns={prompt: nowhere}", f"output_dir={tmp_path / 'other'}")
    ((status, text),) = run.finish(command)
    reading, starting, *lines = text.splitlines()
    assert status == Exit.USAGE and reading.startswith("reading ") and starting.startswith("starting ")
    assert len(lines) == 1, text
    assert lines[0].startswith("error: ") and "prompt: nowhere: no such column" in lines[0]
    assert lines[0] in (tmp_path / "other" / "log.txt").read_text()
    said = json.loads((Path(tmp_path) / "other" / outcome.NAME).read_text())
    assert (said["status"], said["text"]) == (Exit.USAGE, lines[0])
    assert not run.survivors()
