"""Runs that are continued: to the bit, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from harness import run_ranks, without_clock, write_pairs
from small_runs import ALONE, SHORT, changed, evaluate_only, model_bytes, records, train, with_sections

from madpo.trainer.config.schema import Config
from madpo.trainer.errors import FRESH
from madpo.trainer.stages.train import is_exported

RESUMED = {
    "alone": ALONE,
    "memory-of-the-whole-batch": {"objective": {"loss_type": "beta_dpo"}},
    "curriculum-and-quantile": {
        "objective": {"loss_type": "mixdpo", "threshold": "quantile:0.3"},
        "data": {"order": "easy_to_hard"},
    },
    "mismatched-and-cached-reference": {
        "objective": {"loss_type": "kto"},
        "model": {"reference": "cached"},
    },
    "distributions-and-moving-reference": {
        "objective": {"loss_type": "tdpo"},
        "model": {"sync_ref_model": True, "ref_model_sync_steps": 2},
    },
}


@pytest.mark.parametrize("sections", RESUMED.values(), ids=RESUMED)
def test_resume_is_bitwise_the_run_that_was_not_cut_off(config, tmp_path, sections):
    sections = {"objective": config.objective.model_dump(by_alias=True), **sections}
    sections["train"] = SHORT | sections.get("train", {})
    ranks = 1 if "deepspeed" in sections else 2
    whole = with_sections(config, output_dir=str(tmp_path / "whole"), **sections)
    run_ranks(ranks, train, whole)

    # The same run, cut off after the checkpoint of step 2: later files and metrics are gone or torn.
    cut = with_sections(config, output_dir=str(tmp_path / "cut"), **sections)
    shutil.copytree(whole.output_dir, cut.output_dir)
    folder = Path(cut.output_dir)
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    shutil.rmtree(folder / "model")
    (folder / "checkpoints" / "latest").write_text("step-00000002")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run_ranks(ranks, train, cut)

    want, got = ([without_clock(line) for line in records(Path(run.output_dir))] for run in (whole, cut))
    assert got == want
    assert model_bytes(cut) == model_bytes(whole)


def test_metrics_resume_with_intervals_that_do_not_meet(config, tmp_path):
    """A checkpoint at step 3 between log lines at 2 and 4."""
    whole = changed(config, output_dir=str(tmp_path / "whole"), train={"logging_steps": 2, "max_steps": 4})
    run_ranks(2, train, whole)
    cut = changed(whole, output_dir=str(tmp_path / "cut"))
    shutil.copytree(whole.output_dir, cut.output_dir)
    shutil.rmtree(Path(cut.output_dir) / "model")
    (Path(cut.output_dir) / "checkpoints" / "latest").write_text("step-00000003")
    run_ranks(2, train, cut)
    want, got = ([without_clock(x) for x in records(Path(run.output_dir))] for run in (whole, cut))
    assert [line["step"] for line in want if "loss" in line] == [2, 3, 4]
    assert got == want
    assert model_bytes(cut) == model_bytes(whole)


def test_a_leftover_of_a_later_step_never_costs_the_committed_checkpoint(config):
    run = changed(
        config,
        train={"max_steps": 2, "save_steps": 1, "save_total_limit": 1, "eval_steps": None, "export": False},
    )
    run_ranks(1, train, run)
    checkpoints = Path(run.output_dir) / "checkpoints"
    shutil.copytree(checkpoints / "step-00000002", checkpoints / "step-00000009")
    (checkpoints / "step-00000002").rename(checkpoints / "step-00000001")
    state = json.loads((checkpoints / "step-00000001" / "train_state.json").read_text())
    state["state"] |= {"step": 1, "consumed": 8}
    (checkpoints / "step-00000001" / "train_state.json").write_text(json.dumps(state))
    (checkpoints / "latest").write_text("step-00000001")
    run_ranks(1, train, run)
    tag = (checkpoints / "latest").read_text()
    assert tag == "step-00000002" and (checkpoints / tag).is_dir()


CHANGES = [
    ({"objective": {"loss_type": "dpo"}}, r"objective\.loss_type: 'madpo' there, 'dpo' now"),
    ({"optim": {"lr": 1e-4}}, r"optim\.lr: 0\.003 there, 0\.0001 now"),
    ({"train": {"global_batch_size": 4}}, r"train\.global_batch_size: 8 there, 4 now"),
    ({"data": {"max_length": 32}}, r"data\.max_length: 64 there, 32 now"),
    ({"seed": 1}, r"seed: 42 there, 1 now"),
]


@pytest.mark.parametrize("change, message", CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_a_changed_config_is_refused_and_the_run_left_alone(finished, change, message):
    before = (Path(finished.output_dir) / "config.yaml").read_text()
    if "objective" in change:
        other = Config.model_validate(finished.model_dump(by_alias=True) | change)
    else:
        other = changed(finished, **change)
    with pytest.raises(AssertionError, match=message):
        run_ranks(2, train, other)
    assert (Path(finished.output_dir) / "config.yaml").read_text() == before


def test_a_finished_run_is_left_as_it_is(finished, capfd):
    folder = Path(finished.output_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    run_ranks(2, train, finished)
    assert capfd.readouterr().out == f"finished at step 1 already; {FRESH} starts anew\n"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_is_not_finished_before_its_last_checkpoint_is_exported(config, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    pointer, model = tmp_path / "checkpoints" / "latest", tmp_path / "model"
    pointer.touch()
    assert not is_exported(config, tmp_path)
    model.mkdir()
    assert is_exported(config, tmp_path)
    assert not is_exported(changed(config, train={"export_merged": True}), tmp_path)
    os.utime(model, (0, pointer.stat().st_mtime - 1))  # `madpo export` of an earlier checkpoint
    assert not is_exported(config, tmp_path)
    assert is_exported(changed(config, train={"export": False}), tmp_path)


def test_changed_data_is_refused(finished, tmp_path):
    shutil.copytree(str(finished.data.dataset_name), tmp_path / "pairs")
    moved = changed(finished, data={"dataset_name": str(tmp_path / "pairs")})
    write_pairs(tmp_path / "pairs" / "train.jsonl", 21, seed=5)
    with pytest.raises(AssertionError, match=r"data \(content\)"):
        run_ranks(2, train, moved)


def test_another_number_of_ranks_is_refused(finished):
    for task in (train, evaluate_only):
        with pytest.raises(AssertionError, match=r"number of ranks: 2 there, 1 now"):
            run_ranks(1, task, finished)


def test_another_stage_of_zero_is_refused(config):
    alone = changed(config, train={"max_steps": 1, "export": False}, deepspeed={"zero_optimization": {}})
    run_ranks(1, train, alone)
    for task in (train, evaluate_only):
        with pytest.raises(AssertionError, match=r"deepspeed\.zero_optimization\.stage: 2 there, 3 now"):
            run_ranks(1, task, changed(alone, deepspeed={"zero_optimization": {"stage": 3}}))


def private_disk(shard, config: Config, folder: str) -> None:
    """Every rank with an output folder of its own, as on nodes that share no storage."""
    train(shard, changed(config, output_dir=f"{folder}/disk{shard.rank}"))


def test_ranks_that_see_different_folders_are_refused(finished, tmp_path):
    shutil.move(finished.output_dir, tmp_path / "disk0")
    with pytest.raises(AssertionError, match="output_dir must be shared storage"):
        run_ranks(2, private_disk, finished, str(tmp_path))


def test_only_the_newest_checkpoints_are_kept(config):
    short = {"max_steps": 3, "eval_steps": None, "save_steps": 1, "save_total_limit": 2, "export": False}
    run_ranks(1, train, changed(config, train=short))
    checkpoints = Path(config.output_dir) / "checkpoints"
    assert sorted(p.name for p in checkpoints.glob("step-*")) == ["step-00000002", "step-00000003"]
    assert (checkpoints / "latest").read_text() == "step-00000003"
