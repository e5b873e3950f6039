"""What is refused before ranks start, for every kind of reason that can be known by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import command

from madpo.launch.preflight import check
from madpo.trainer.config.schema import Config


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> dict[str, Any]:
    """A config of a model and a single file of pairs that are there."""
    folder = tmp_path_factory.mktemp("preflight")
    (folder / "model").mkdir()
    (folder / "empty").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    (folder / "pairs.jsonl").write_text("{}\n")
    (folder / "pairs.csv").write_text("prompt,chosen,rejected\n")
    return {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(folder / "model")},
        "data": {"dataset_name": str(folder / "pairs.jsonl")},
        "objective": {"loss_type": "dpo"},
    }


def config(tree: dict[str, Any], **sections: Any) -> Config:
    merged = {
        name: {**tree.get(name, {}), **value} if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return Config.model_validate(tree | merged)


def test_what_can_begin_passes(tree):
    check(config(tree), "train")


@pytest.mark.parametrize(
    ("task", "sections", "said"),
    [
        ("train", {"train": {"head_impl": "triton"}}, "train.head_impl: triton runs on GPUs only"),
        ("train", {"model": {"attention": "flex"}}, "model.attention: flex trains on GPUs only"),
        ("train", {"model": {"use_liger_kernel": True}}, "model.use_liger_kernel: "),
        ("train", {"train": {"eval_steps": 5}}, "train.eval_steps: there is nothing to evaluate on"),
        ("train", {"data": {"dataset_name": "{folder}/pairs.csv"}}, "a file must be .jsonl or .parquet"),
        ("train", {"data": {"dataset_name": "{folder}", "dataset_train_split": "x"}}, "no split 'x'"),
        ("train", {"data": {"dataset_name": "{folder}/none.jsonl"}}, "no such file or folder"),
        ("train", {"data": {"dataset_test_split": "test"}}, "is a single file"),
        ("train", {"model": {"model_name_or_path": "{folder}/empty"}}, "holds no model: no config.json"),
        (
            "train",
            {"deepspeed": {"zero_optimization": {"zero_quantized_weights": True}}},
            "DeepSpeed quantises on GPUs only",
        ),
        ("evaluate", {}, "run is not there; train first"),
        ("export", {}, "run is not there; train first"),
        ("annotate", {}, "annotate takes the config of a reward run (bradley_terry), not of dpo"),
        (
            "annotate",
            {"objective": {"loss_type": "bradley_terry"}, "annotate": {"models": ["{folder}/none"]}},
            "annotate.models: ",
        ),
        ("generate", {"generate": {"models": ["{folder}/none"]}}, "generate.models: "),
        (
            "generate",
            {"generate": {"judge": {"reward_model": "{folder}/none"}}},
            "generate.judge.reward_model: ",
        ),
    ],
)
def test_what_cannot_begin_is_refused(tree, monkeypatch, task, sections, said):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError) as caught:
        check(config(tree, **_filled(sections, Path(tree["output_dir"]).parent)), task)
    assert said in str(caught.value)


def _filled(value: Any, folder: Path) -> Any:
    """The value with the folder's path in its texts."""
    if isinstance(value, dict):
        return {key: _filled(child, folder) for key, child in value.items()}
    if isinstance(value, list):
        return [_filled(child, folder) for child in value]
    return value.format(folder=folder) if isinstance(value, str) else value


def test_a_start_without_held_out_data_has_nothing_to_evaluate(tree):
    with pytest.raises(ValueError, match=r"data.dataset_test_split: auto leaves nothing to evaluate on"):
        check(config(tree), "evaluate", base=True)


def test_the_command_line_checks_before_it_starts_ranks(tree, tmp_path):
    file = tmp_path / "c.json"
    file.write_text(Config.model_validate(tree).model_dump_json(by_alias=True))
    status, out, error = command("train", str(file), "train.eval_steps=5")
    assert (status, out) == (2, f"reading {file}\n")
    assert error.startswith("error: train.eval_steps: there is nothing to evaluate on")
