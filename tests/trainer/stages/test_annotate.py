"""Folds by prompt, cross-fitted scores, several models: each against the model scoring by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from harness import make_config, plain_scores, run_ranks, save_classifier, save_model, write_pairs

from madpo.launch import fold_models as launch_folds
from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.config.schema import Config, dump
from madpo.trainer.data import training_data
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.folds import folds_of, without_fold
from madpo.trainer.data.source import Origin, Source
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.data.training_data import load_data
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.read_row import RowRules, read_row
from madpo.trainer.formats.text_groups import TextGroup, hash_of_prompt
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.annotate import fold_config, load_pairs, run_annotation
from madpo.trainer.stages.annotated_split import JudgedSplit, together, write_split
from madpo.trainer.stages.train import run_training

FOLDS = 3


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    """A reward run whose training prompts stand there twice."""
    model = save_model(tmp_path / "start", tokenizer_folder, seed=1)
    rows = write_pairs(tmp_path / "pairs" / "train.jsonl", 24).read_text().splitlines()
    again = [json.dumps({**json.loads(row), "rejected": f" other {i}"}) for i, row in enumerate(rows)]
    (tmp_path / "pairs" / "train.jsonl").write_text("\n".join(rows + again) + "\n")
    write_pairs(tmp_path / "pairs" / "test.jsonl", 9, seed=3)
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(tmp_path / "pairs"), "dataset_test_split": "test"},
            "objective": {"loss_type": "bradley_terry"},
            "optim": {"lr": 3e-3},
            "train": {"num_train_epochs": 3},
        },
    )


def changed(config: Config, section: str, **values: Any) -> Config:
    tree = config.model_dump(by_alias=True)
    tree[section] = {**tree[section], **values}
    return Config.model_validate(tree)


def training_groups(config: Config) -> GroupDataset:
    """A group for every row, also where training merges those of a prompt."""
    return training_data.training_groups(config, load_tokenizer(config.model))[0]


def test_folds_cover_are_disjoint_and_keep_equal_prompts_together(config):
    whole = training_groups(config)
    folds = folds_of(whole.prompt_hashes, FOLDS)
    assert set(folds.tolist()) == set(range(FOLDS))
    assert (folds[:24] == folds[24:]).all()  # the same prompts again
    left_out = []
    for fold in range(FOLDS):
        part = training_groups(changed(config, "data", folds=FOLDS, fold=fold))
        left_out.append(set(whole.rows.tolist()) - set(part.rows.tolist()))
        assert left_out[fold] == set(whole.rows[folds == fold].tolist())
        merging = changed(config, "data", folds=FOLDS, fold=fold, merge_prompts=True)
        held_out = load_data(merging, load_tokenizer(config.model), False).held_out
        report = load_data(merging, load_tokenizer(config.model), True).report["train"]
        assert (2 * report["groups"], report["without_fold"]) == (len(part), fold)
        assert held_out is not None and len(held_out) == 9  # which is nobody's to train on
        index = next(i for i, row in enumerate(whole.rows) if row == part.rows[0])
        assert part[0] == whole[index]
    assert sum(map(len, left_out)) == len(set.union(*left_out)) == len(whole)


def test_a_run_without_a_fold_is_another_run(config):
    fingerprints = {training_groups(config).fingerprint}
    for fold in range(FOLDS):
        fingerprints.add(training_groups(changed(config, "data", folds=FOLDS, fold=fold)).fingerprint)
    assert len(fingerprints) == 1 + FOLDS


def test_the_hash_is_of_the_prompt_whatever_its_completions():
    one, two = TextGroup("p", ["a", "b"], []), TextGroup("p", ["c"], [])
    assert hash_of_prompt(one) == hash_of_prompt(two) >= 0
    assert hash_of_prompt(TextGroup("q", ["a", "b"], [])) != hash_of_prompt(one)
    assert hash_of_prompt(TextGroup("", ["a"], [])) != hash_of_prompt(TextGroup("", ["b"], []))
    messages: list[Any] = [{"role": "user", "content": "p"}]
    assert hash_of_prompt(TextGroup(messages, [messages], [])) != hash_of_prompt(one)


def test_too_few_prompts_for_the_folds(config):
    groups = training_groups(config)
    alone = groups.select(np.flatnonzero(groups.prompt_hashes == groups.prompt_hashes[0]), "alone")
    with pytest.raises(ValueError, match=r"alone has 2 of its 2 groups in fold \d of 2.* 1 different ones"):
        without_fold(alone, 2, int(groups.prompt_hashes[0] % 2))


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("data", {"folds": 3}, "set folds and fold together"),
        ("data", {"fold": 3}, "set folds and fold together"),
        ("data", {"folds": 3, "fold": 3}, "fold 3 is none of 0 to 2"),
        ("annotate", {"folds": 3, "models": ["m"]}, "not both"),
        ("annotate", {"folds": 1}, "greater than or equal to 2"),
    ],
)
def test_folds_that_cannot_be(config, section, values, message):
    with pytest.raises(ValueError, match=message):
        changed(config, section, **values)


def test_annotation_sets_the_folds_of_its_models_itself(config):
    with pytest.raises(ValueError, match=r"annotate.folds sets it for every model"):
        changed(changed(config, "data", folds=3, fold=1), "annotate", folds=3)


def test_only_what_all_judges_have_scored_is_scored():
    rows = [np.array([1, 2, 4]), np.array([2, 3, 4])]
    scores = [np.array([[1.0, 0], [2, 0], [4, 0]]), np.array([[20.0, 0], [30, 0], [40, 0]])]
    scored = together(rows, scores, None)
    assert scored.rows.tolist() == [2, 4]
    assert scored.combined[:, 0].tolist() == [11, 22]
    assert scored.margin_std is not None and scored.margin_std.tolist() == [9, 18]
    crossed = together(rows, scores, np.array([0, 1, 0]))
    assert crossed.combined[:, 0].tolist() == [20, 4] and crossed.margin_std is None
    assert crossed.seen is not None and crossed.seen.tolist() == [2, 40]


def test_a_score_that_is_not_finite_is_none_and_counted():
    rows, values = [np.array([1, 2, 4])] * 2, np.array([[1.0, 0], [np.nan, 0], [4, 0]])
    scored = together(rows, [values, np.array([[1.0, -np.inf], [2, 0], [6, 1]])], np.array([0, 0, 1]))
    assert (scored.rows.tolist(), scored.combined.tolist(), scored.not_finite) == ([4], [[6, 1]], 2)
    with pytest.raises(ValueError, match="none of 3 pairs has a finite score"):
        together(rows, [values, np.full((3, 2), np.inf)], None)


def train_folds_and_annotate(shard, config: Config) -> None:
    for fold in range(FOLDS):
        run_training(fold_config(config, fold), "madpo reward test.yaml")
    run_annotation(config)


def by_hand(config: Config, folder: Path, split: str) -> np.ndarray:
    """(rows, 2) the exported model's scores of every pair, through transformers alone."""
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    groups, _ = load_groups(config.data, split, load_tokenizer(config.model))
    with torch.no_grad():
        return plain_scores(model, [groups[i] for i in range(len(groups))]).view(-1, 2).double().numpy()


def annotated(folder: Path, split: str, *columns: str) -> np.ndarray:
    lines = (folder / "annotated" / f"{split}.jsonl").read_text().splitlines()
    return np.array([[json.loads(line)[column] for column in columns] for line in lines])


@pytest.mark.ranks
def test_a_row_is_scored_by_the_model_that_has_not_seen_it(config):
    config = changed(changed(config, "annotate", folds=FOLDS), "train", num_train_epochs=1.0)
    run_ranks(2, train_folds_and_annotate, config, timeout=240)
    folder = Path(config.output_dir)
    models = [folder / f"fold-{fold}" / "model" for fold in range(FOLDS)]
    scores = np.stack([by_hand(config, model, "train") for model in models])
    groups, _ = load_groups(config.data, "train", load_tokenizer(config.model))
    folds = groups.prompt_hashes % FOLDS
    got = annotated(folder, "train", "score_chosen", "score_rejected", "margin")
    want = scores[folds, np.arange(len(folds))]
    assert np.abs(scores[(folds + 1) % FOLDS, np.arange(len(folds))] - want).max() > 0.01
    assert got[:, :2] == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert got[:, 2] == pytest.approx(want[:, 0] - want[:, 1], rel=1e-3, abs=1e-4)

    tests = np.stack([by_hand(config, model, "test") for model in models])
    margins = tests[..., 0] - tests[..., 1]
    got = annotated(folder, "test", "score_chosen", "score_rejected", "margin", "margin_std")
    assert got[:, :2] == pytest.approx(tests.mean(0), rel=1e-4, abs=1e-5)
    assert got[:, 2:] == pytest.approx(np.stack([margins.mean(0), margins.std(0)], 1), rel=1e-3, abs=1e-4)

    facts = json.loads((folder / "annotated" / "annotation.json").read_text())
    assert facts["train"]["rows_of_fold"] == np.bincount(folds, minlength=FOLDS).tolist()
    assert len(facts["train"]["models"]) == FOLDS and "mod 3" in facts["train"]["rule"]
    seen = scores[..., 0] - scores[..., 1]
    saw = np.arange(FOLDS)[:, None] != folds
    in_sample = (seen * saw).sum(0) / (FOLDS - 1)
    assert facts["train"]["in_sample"]["accuracy"] == pytest.approx((in_sample > 0).mean())
    assert facts["train"]["accuracy"] == pytest.approx((want[:, 0] > want[:, 1]).mean())
    report = (folder / "annotated" / "report.html").read_text(encoding="utf-8")
    assert "train, cross-fitted" in report and "train, seen in training" in report


@pytest.mark.ranks
def test_a_fold_that_was_trained_on_other_rows_or_not_to_its_end_judges_nothing(config):
    config = changed(config, "annotate", folds=2)
    with pytest.raises(AssertionError, match=r"no checkpoint; madpo annotate trains the folds"):
        run_ranks(2, annotate, config)
    run_ranks(2, train_both_folds, changed(config, "train", num_train_epochs=1.0))
    with pytest.raises(AssertionError, match=r"train.num_train_epochs: 1.0 there, 3.0 now"):
        run_ranks(2, annotate, config)
    with (Path(str(config.data.dataset_name)) / "train.jsonl").open("a") as file:
        file.write('{"prompt": "new", "chosen": " a", "rejected": " b"}\n')
    with pytest.raises(AssertionError, match=r"data \(content\)"):
        run_ranks(2, annotate, changed(config, "train", num_train_epochs=1.0))


def train_both_folds(shard, config: Config) -> None:
    for fold in range(2):
        run_training(fold_config(config, fold), "madpo reward test.yaml")


def annotate(shard, config: Config) -> None:
    run_annotation(config)


def test_rows_of_several_comparisons_have_no_one_margin(config, tmp_path):
    """With edges best_worst they are pairs."""
    row = {"prompt": "the", "completions": [" a", " b", " c"], "scores": [1.0, 2.0, 3.0]}
    path = tmp_path / "ranked.jsonl"
    path.write_text(json.dumps(row) + "\n")
    ranked = changed(config, "data", dataset_name=str(path), dataset_test_split=None)
    with pytest.raises(ValueError, match=r"several comparisons in 1 row; set data.edges=best_worst"):
        run_annotation(ranked)
    data, _ = load_pairs(changed(ranked, "data", edges="best_worst"))
    (groups,) = data.values()
    assert groups[0].edges == [(1, 0, 2.0)]


def test_what_is_written_is_read_by_the_same_config(tmp_path):
    """A renamed margin stands under its own name; earlier margins are kept; NaN, which JSON has not, is null,
    and bytes are text; rows that were not scored are not there."""
    row = {"prompt": b"p", "chosen": "a", "rejected": "b", "gap": 0.5, "other": math.nan}
    given = [row, {**row, "gap": 9.0}, {**row, "prompt": b"q", "gap": -1.0}]
    scored = JudgedSplit(np.array([0, 2]), np.array([[[7.0, 1.0], [2.0, 4.0]]]), None)
    renames = {"margin": "gap"}
    for rounds in ("first", "second"):
        source = Source(Origin(rounds, "row"), datasets.Dataset.from_list(given), rounds)
        write_split(tmp_path, "train", source, scored, ["model"], renames)
        rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
        read = [read_row(row, ADAPTERS["preference"], RowRules(columns=renames)).edges for row in rows]
        assert read == [[(0, 1, 6.0)], [(0, 1, -2.0)]]
        assert rows[0]["prompt"] == "p" and rows[0]["other"] is None and rows[0]["score_chosen"] == 7.0
        scored = JudgedSplit(np.array([0, 1]), scored.scores, None)
        given = rows
    assert rows[0]["gap_given"] == 0.5 and rows[0]["gap_given_before"] == 6.0


@pytest.mark.ranks
def test_several_given_models_score_by_their_mean(config, tmp_path, tokenizer_folder):
    models = [save_classifier(tmp_path / "a", tokenizer_folder), tmp_path / "run"]
    save_classifier(tmp_path / "run" / "model", tokenizer_folder, seed=9)  # named by its run folder
    config = changed(config, "annotate", models=[str(model) for model in models])
    run_ranks(2, annotate, config)
    folder = Path(config.output_dir)
    for split in ("train", "test"):
        scores = np.stack([by_hand(config, path, split) for path in (models[0], models[1] / "model")])
        margins = scores[..., 0] - scores[..., 1]
        got = annotated(folder, split, "score_chosen", "margin", "margin_std")
        want = np.stack([scores[..., 0].mean(0), margins.mean(0), margins.std(0)], 1)
        assert want[:, 2].min() > 0
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4)
    facts = json.loads((folder / "annotated" / "annotation.json").read_text())
    assert facts["test"]["rule"] == "mean of the models" and facts["test"]["margin_std_mean"] > 0


@pytest.mark.ranks
def test_given_adapters_score_whatever_shape_the_config_gives_its_own(config, tmp_path):
    """Run with r=4, named by a config with r=8 and a base of its own."""
    tree = config.model_dump(by_alias=True)
    short = {**tree["train"], "max_steps": 2}
    trained = {**tree, "output_dir": str(tmp_path / "judge"), "peft": {"lora_r": 4}, "train": short}
    run_ranks(1, train_one, Config.model_validate(trained))
    peft = {"lora_r": 8, "base_model_name_or_path": "elsewhere"}
    given = Config.model_validate({**tree, "peft": peft, "annotate": {"models": [str(tmp_path / "judge")]}})
    run_ranks(1, annotate, given)
    facts = json.loads((Path(given.output_dir) / "annotated" / "annotation.json").read_text())
    assert facts["test"]["scored"] == 9 and facts["test"]["models"] == [str(tmp_path / "judge" / "model")]
    quantised = {**peft, "load_in_8bit": True}
    settings = PeftConfig(**quantised).of_given_models()
    assert settings == PeftConfig(load_in_8bit=True)


def train_one(shard, config: Config) -> None:
    run_training(config, "madpo reward test.yaml")


def test_the_launcher_trains_the_folds_that_the_stage_asks_for(config, tmp_path, monkeypatch):
    """The command lines resolve to the stage's own configs; a finished fold is not started again."""
    config = changed(config, "annotate", folds=FOLDS)
    path = tmp_path / "config.yaml"
    path.write_text(dump(changed(config, "annotate", folds=None)))
    started: list[Config] = []

    def run(task, file, overrides, resolved) -> int:
        Path(resolved.output_dir).mkdir(parents=True, exist_ok=True)
        started.append(resolved)
        return 7 if len(started) == 3 else 0

    monkeypatch.setattr("madpo.launch.local.run", run)
    assert launch_folds.train_folds(config, str(path), [f"annotate.folds={FOLDS}"]) == 7
    assert started == [fold_config(config, fold) for fold in range(FOLDS)]
    assert launch_folds.train_folds(config, str(path), [f"annotate.folds={FOLDS}"]) == 0
    assert started[3:] == [fold_config(config, 2)]
