"""`madpo.train`, `madpo.evaluate` and `madpo.generate`: in one process, and as one of several ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
from harness import run_ranks, save_model, without_clock, write_pairs
from torch import distributed

import madpo
from madpo.trainer import dist

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_folder) -> Path:
    folder = tmp_path_factory.mktemp("api")
    save_model(folder / "start", tokenizer_folder, seed=1)
    write_pairs(folder / "pairs" / "train.jsonl", 16)
    write_pairs(folder / "pairs" / "evaluation.jsonl", 5, seed=9)
    return folder


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs" / f"{split}.jsonl").read_text().splitlines()]


def tree(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    return {
        "output_dir": folder / name,
        "model": {"model_name_or_path": folder / "start"},
        "data": {"cache_dir": folder / "cache", "max_length": 64},
        "objective": {"loss_type": "dpo"},
        "optim": {"lr": 1e-3},
        "train": {"bf16": False, "global_batch_size": 8, "micro_batch_tokens": 256, "logging_steps": 1},
        **sections,
    }


def losses(result: madpo.TrainResult) -> list[float]:
    return [record["loss"] for record in result.history if "loss" in record]


def as_a_script(shard, folder: Path) -> dict[str, Any]:
    """Several calls in a process that no launcher started; what they return, raise and leave behind."""
    dist.leave()
    for name in LAUNCHERS:
        os.environ.pop(name, None)
    before = dict(os.environ)
    facts: dict[str, Any] = {}
    train, held_out = rows(folder, "train"), rows(folder, "evaluation")
    seen: list[Any] = []
    first = madpo.train(tree(folder, "run"), train=train, evaluation=held_out, callbacks=[seen.append])
    facts["first"], facts["seen"] = first, seen
    facts["left"] = dict(os.environ) == before and not distributed.is_initialized()

    def stop(record: Any) -> None:
        raise KeyError("stop here")

    try:
        madpo.train(tree(folder, "other"), train=train, callbacks=[stop])
    except KeyError as error:
        facts["raised"] = error.args
    facts["again"] = madpo.train(tree(folder, "other"), train=datasets.Dataset.from_list(train))
    facts["fresh"] = madpo.train(tree(folder, "other", optim={"lr": 2e-3}), train=train, fresh=True)
    facts["evaluated"] = madpo.evaluate(folder / "run" / "config.yaml", evaluation=held_out[::-1])
    sampling = tree(folder, "samples", generate={"max_new_tokens": 4, "num_completions": 2})
    models = [folder / "start", folder / "run"]
    facts["samples"] = madpo.generate(sampling, prompts=["the film", "a book"], models=models)
    facts["left at the end"] = dict(os.environ) == before and not distributed.is_initialized()
    return facts


@pytest.mark.ranks
def test_a_script_or_notebook_calls_them_one_after_another(folder):
    (facts,) = run_ranks(1, as_a_script, folder)
    first: madpo.TrainResult = facts["first"]
    assert first.output_dir == folder / "run" and first.model == folder / "run" / "model"
    assert (folder / "run" / "model" / "model.safetensors").is_file() and len(losses(first)) == 2
    assert facts["seen"] == first.history and first.evaluation == first.history[-1]
    assert facts["left"] and facts["left at the end"]

    assert facts["raised"] == ("stop here",)
    again = facts["again"]
    assert losses(again) == losses(first) and again.evaluation is None
    assert losses(facts["fresh"])[1] != losses(again)[1] and (folder / "other.old-1").is_dir()

    evaluated = facts["evaluated"]
    assert evaluated["model"] == "step-00000002"
    assert evaluated == json.loads((folder / "run" / "evaluation.json").read_text())
    assert first.evaluation is not None
    assert evaluated["eval_loss"] == pytest.approx(first.evaluation["eval_loss"], rel=1e-6)

    samples = facts["samples"]
    assert [record["prompt"] for record in samples] == ["the film", "a book"]
    assert samples[0]["models"] == [str(folder / name) for name in ("start", "start", "run", "run")]


def as_a_rank(shard, folder: Path) -> tuple[madpo.TrainResult, ...]:
    """The same rows from memory and from files, in ranks that have joined already."""
    in_files = tree(folder, "files")
    in_files["data"] |= {"dataset_name": folder / "pairs", "dataset_test_split": "evaluation"}
    in_memory = tree(folder, "memory")
    train, held_out = rows(folder, "train"), rows(folder, "evaluation")
    return madpo.train(in_files), madpo.train(in_memory, train=train, evaluation=held_out)


@pytest.mark.ranks
def test_rows_in_memory_train_as_rows_in_files_do_and_every_rank_gets_the_result(folder):
    results = run_ranks(2, as_a_rank, folder)
    assert results[0] == results[1]
    in_files, in_memory = ([without_clock(record) for record in run.history] for run in results[0])
    assert in_files == in_memory and len(in_memory) == 4


def test_configs_are_read_from_paths_mappings_and_configs(folder, tmp_path):
    small = tree(folder, "run", data={"dataset_name": "x", "cache_dir": folder, "max_length": 64})
    config = madpo.load_config(small, {"optim.lr": 0.5, "data.dataset_name": folder / "pairs"})
    assert isinstance(config, madpo.Config) and config.optim.lr == 0.5
    assert config.data.dataset_name == str(folder / "pairs")
    assert madpo.load_config(config) is config
    assert madpo.load_config(config, {"seed": 7}).seed == 7
    (tmp_path / "x.yaml").write_text("output_dir: here\n")
    with pytest.raises(madpo.UserError, match=r"x\.yaml: .*problems"):
        madpo.load_config(tmp_path / "x.yaml")
    with pytest.raises(madpo.UserError, match=r"optim\.lr"):
        madpo.load_config(small, {"optim.lr": -1})
    sft = madpo.load_config({**small, "objective": None}, task="sft")
    assert sft.objective.loss_type == "nll"


def test_what_is_given_in_memory_and_what_the_config_names_do_not_mix(folder):
    named = tree(folder, "run", data={"dataset_name": "x", "dataset_test_split": "test"})
    with pytest.raises(madpo.UserError, match=r"evaluation: the config names 'test'"):
        madpo.train(named, train=rows(folder, "train"))
    with pytest.raises(madpo.UserError, match=r"give train=\.\.\. too"):
        madpo.train(named, evaluation=rows(folder, "evaluation"))
    bad = [*rows(folder, "train"), {"prompt": "x", "chosen": 3, "rejected": "y"}]
    with pytest.raises(madpo.UserError, match=r"^train\[16\]: chosen: expected text"):
        madpo.train(tree(folder, "bad"), train=bad)


def test_a_task_that_is_none_is_refused():
    with pytest.raises(madpo.UserError, match="task: train, sft or reward, got 'kto'"):
        madpo.train({}, task="kto")  # pyright: ignore[reportArgumentType]
