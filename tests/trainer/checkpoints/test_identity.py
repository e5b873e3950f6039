"""Runs that are continued: to the bit, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from harness import run_ranks, save_model, without_clock, write_pairs
from small_runs import (
    ALONE,
    SHORT,
    changed,
    cut_off,
    evaluate_only,
    model_bytes,
    records,
    train,
    with_sections,
)

from madpo.trainer.checkpoints.folders import checkpoints_in
from madpo.trainer.checkpoints.identity import RANKS, difference, identity, model_identity
from madpo.trainer.config.schema import Config
from madpo.trainer.dist import Shard
from madpo.trainer.errors import FRESH
from madpo.trainer.schedule import learning_rate
from madpo.trainer.stages.run_facts import is_exported
from madpo.trainer.stages.train import run_training

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
    cut = cut_off(whole, tmp_path / "cut", 2)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run_ranks(ranks, train, cut)

    want, got = ([without_clock(line) for line in records(Path(run.output_dir))] for run in (whole, cut))
    assert got == want
    assert model_bytes(cut) == model_bytes(whole)


def test_metrics_resume_with_intervals_that_do_not_meet(config, tmp_path):
    """A checkpoint at step 3 between log lines at 2 and 4."""
    whole = changed(config, output_dir=str(tmp_path / "whole"), train={"logging_steps": 2, "max_steps": 4})
    run_ranks(2, train, whole)
    cut = cut_off(whole, tmp_path / "cut", 3)
    run_ranks(2, train, cut)
    want, got = ([without_clock(x) for x in records(Path(run.output_dir))] for run in (whole, cut))
    assert [line["step"] for line in want if "loss" in line] == [2, 3, 4]
    assert got == want
    assert model_bytes(cut) == model_bytes(whole)


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
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.name not in (".lock", ".owner.json")
    }
    run_ranks(2, train, finished)
    assert capfd.readouterr().out == (
        f"finished at step 1 already; --extend train.max_steps=N trains on, {FRESH} starts anew\n"
    )
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_is_not_finished_before_its_last_checkpoint_is_exported(config, tmp_path):
    manifest, model = tmp_path / "checkpoints" / "step-00000004" / "manifest.json", tmp_path / "model"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    assert not is_exported(config, tmp_path)
    model.mkdir()
    assert is_exported(config, tmp_path)
    assert not is_exported(changed(config, train={"export_merged": True}), tmp_path)
    os.utime(model, (0, manifest.stat().st_mtime - 1))  # `madpo export` of an earlier checkpoint
    assert not is_exported(config, tmp_path)
    assert is_exported(changed(config, train={"export": False}), tmp_path)


def test_changed_data_is_refused(finished, tmp_path):
    shutil.copytree(str(finished.data.dataset_name), tmp_path / "pairs")
    moved = changed(finished, data={"dataset_name": str(tmp_path / "pairs")})
    write_pairs(tmp_path / "pairs" / "train.jsonl", 21, seed=5)
    with pytest.raises(AssertionError, match=r"data \(content\)"):
        run_ranks(2, train, moved)


def extended(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml --extend", extend=True)


def test_a_finished_run_is_extended_on_purpose_only(finished, tmp_path):
    longer = changed(finished, train={"max_steps": 3})
    with pytest.raises(AssertionError, match=r"train\.max_steps: 1 there, 3 now\ngive .* --extend"):
        run_ranks(2, train, longer)
    run_ranks(2, extended, longer)
    lines = [line for line in records(Path(longer.output_dir)) if "loss" in line]
    want = [learning_rate(longer.optim, step, 3) for step in (1, 2)]
    assert [line["learning_rate"] for line in lines[1:]] == want
    facts = json.loads((Path(longer.output_dir) / "run.json").read_text())
    assert facts["extended"] == [[1, "train.max_steps 1 -> 3"]] and facts["total_steps"] == 3
    run_ranks(2, train, longer)  # a run of that length now
    with pytest.raises(AssertionError, match=r"optim\.lr: .* there, 0\.5 now"):
        run_ranks(2, extended, changed(longer, train={"max_steps": 4}, optim={"lr": 0.5}))


def test_other_weights_under_the_same_name_are_another_run(finished, tmp_path, tokenizer_folder):
    """Of the policy's start, which is the reference too; a copy with later time stamps is no other model."""
    model = tmp_path / "model"
    shutil.copytree(str(finished.model.model_name_or_path), model)
    moved = changed(finished, model={"model_name_or_path": str(model)}, output_dir=str(tmp_path / "run"))
    run_ranks(2, train, moved)
    for path in model.iterdir():
        os.utime(path, (0, 0))
    run_ranks(2, train, moved)
    save_model(model, tokenizer_folder, seed=8)
    message = r"model\.model_name_or_path \(content\): '\w+' there, '\w+' now"
    for task in (train, evaluate_only):
        with pytest.raises(AssertionError, match=message):
            run_ranks(2, task, moved)


def test_the_number_of_ranks_is_part_of_a_run_only_where_the_loss_looks_at_packed_rows(config):
    assert RANKS not in identity(config, Shard(0, 2))
    with_routers = changed(config, model={"router_aux_loss_coef": 0.1})
    assert identity(with_routers, Shard(0, 2))[RANKS] == 2


def test_the_identity_of_a_model_is_what_decides_which_weights_fit(config):
    found, whole = model_identity(config, Shard(0, 2)), identity(config, Shard(0, 2), "content")
    assert found == {key: whole[key] for key in found}
    assert {key.split(".")[0] for key in found} == {"model", "peft"}
    assert whole["data (content)"] == "content"
    assert json.loads(json.dumps(whole)) == whole


def test_another_value_of_any_key_is_named():
    stored = {"seed": 42, "objective.beta": 0.1}
    assert difference(stored, stored) is None
    # One that the run had and that is no longer asked for is no hindrance; one that it did not have is.
    assert difference(stored, {"seed": 42}) is None
    assert (
        difference(stored, {"new": None, "seed": 1})
        == "\n  new: null there, null now\n  seed: 42 there, 1 now"
    )


def test_a_section_that_comes_is_named_without_its_keys():
    asked = {"peft": True, "peft.lora_r": 8, "pefts": 1}
    assert (
        difference({"peft": False, "pefts": 2}, asked)
        == "\n  peft: false there, true now\n  pefts: 2 there, 1 now"
    )
    assert (
        difference({"peft": True, "peft.lora_r": 4, "pefts": 1}, asked) == "\n  peft.lora_r: 4 there, 8 now"
    )


def test_only_the_newest_checkpoints_are_kept(config):
    short = {"max_steps": 3, "eval_steps": None, "save_steps": 1, "save_total_limit": 2, "export": False}
    run_ranks(1, train, changed(config, train=short))
    found = checkpoints_in(Path(config.output_dir) / "checkpoints")
    assert [path.name for path in found] == ["step-00000003", "step-00000002"]
