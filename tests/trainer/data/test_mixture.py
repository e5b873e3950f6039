"""Mixtures: every part as if it were alone, taken as often as its fraction says, one after another."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from harness import make_config, run_ranks, save_model, write_pairs
from transformers import AutoTokenizer

from madpo.trainer.config.schema import Config, dump, load
from madpo.trainer.data import tokenised_cache
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.mixture import load_split
from madpo.trainer.data.tokenised_cache import share, tokenise_all
from madpo.trainer.data.training_data import load_data, training_groups
from madpo.trainer.stages.annotate import run_annotation
from madpo.trainer.stages.probe import run_probe
from madpo.trainer.stages.quantiles import resolve_quantiles
from madpo.trainer.stages.train import run_training


@pytest.fixture
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def parts(tmp_path) -> tuple[Path, Path]:
    """A .jsonl file of 12 pairs, and a folder with 8 as .parquet and 5 held out."""
    rows = write_pairs(tmp_path / "rows.jsonl", 8, seed=5).read_text().splitlines()
    write_pairs(tmp_path / "second" / "test.jsonl", 5, seed=9)
    second = datasets.Dataset.from_list([json.loads(row) for row in rows])
    second.to_parquet(str(tmp_path / "second" / "train.parquet"))
    return write_pairs(tmp_path / "first.jsonl", 12), tmp_path / "second"


def config_for(folder: Path, *parts: dict[str, Any], **sections: Any) -> Config:
    data = {"datasets": list(parts), **sections.pop("data", {})}
    model = {"model_name_or_path": "unused", **sections.pop("model", {})}
    return make_config(folder, {"model": model, "data": data, **sections})


def groups_of(config: Config, tokenizer) -> GroupDataset:
    return load_split(config.data, False, tokenizer)[0]


def listed(groups: GroupDataset) -> list[str]:
    return [repr(groups[index]) for index in range(len(groups))]


def test_a_mixture_is_its_parts_one_after_another(tmp_path, tokenizer, parts):
    """A mixture has the groups and counts of a file made by hand."""
    first, second = parts
    by_hand = tmp_path / "both.jsonl"
    by_hand.write_text(first.read_text() + (tmp_path / "rows.jsonl").read_text())
    mixed = groups_of(config_for(tmp_path, {"path": str(first)}, {"path": str(second)}), tokenizer)
    plain = groups_of(make_config(tmp_path, _alone(by_hand)), tokenizer)
    assert listed(mixed) == listed(plain) and len(mixed) == 20
    for name in ("lengths", "completion_tokens", "sequences", "edges", "labelled"):
        np.testing.assert_array_equal(getattr(mixed.counts, name), getattr(plain.counts, name))
    for name in ("completion_lengths", "margins"):
        np.testing.assert_array_equal(getattr(mixed, name), getattr(plain, name))
    np.testing.assert_array_equal(mixed.ease("easy_to_hard"), plain.ease("easy_to_hard"))
    assert mixed.name == f"{first} + {second / 'train.parquet'}"


def _alone(path: Path, **data: Any) -> dict[str, Any]:
    return {"model": {"model_name_or_path": "unused"}, "data": {"dataset_name": str(path), **data}}


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1, 1.25, 2.5, 3])
def test_fractions_are_exact(tmp_path, tokenizer, parts, fraction):
    """Every group as often as the fraction has wholes, and a share of them once more."""
    alone = listed(groups_of(config_for(tmp_path, {"path": str(parts[0])}), tokenizer))
    taken = listed(groups_of(config_for(tmp_path, {"path": str(parts[0]), "fraction": fraction}), tokenizer))
    assert len(taken) == fraction * 12
    times = Counter(taken)
    assert set(times) <= set(alone)
    often = Counter(times[group] for group in alone)
    whole, rest = divmod(fraction, 1)
    assert (
        often == Counter({int(whole): round((1 - rest) * 12), int(whole) + 1: round(rest * 12)}) - Counter()
    )
    assert [alone.index(x) for x in taken[: 12 * int(whole)]] == list(range(12)) * int(whole)


PINNED = [0, 2, 21, 38, 43, 54, 66, 69, 85, 91]
"""As a run that was cut off with an earlier version had it."""


def test_a_share_is_the_same_in_every_run_and_larger_ones_hold_it():
    shares = [share(100, fraction) for fraction in (0.1, 0.37, 0.8, 1.0)]
    assert [len(x) for x in shares] == [10, 37, 80, 100]
    for smaller, larger in itertools.pairwise(shares):
        assert set(smaller) < set(larger)
        assert (np.diff(larger) > 0).all(), "in the order of the file"
    assert shares[0].tolist() == PINNED


def test_another_fraction_is_other_data_and_costs_no_tokenising(tmp_path, tokenizer, parts, monkeypatch):
    calls = []
    original = tokenise_all
    monkeypatch.setattr(tokenised_cache, "tokenise_all", lambda *a: (calls.append(1), original(*a)))
    found = []
    for fractions in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (1.0, 1.0)):
        described = [{"path": str(p), "fraction": f} for p, f in zip(parts, fractions, strict=True)]
        found.append(groups_of(config_for(tmp_path, *described), tokenizer).fingerprint)
    assert len(calls) == 2
    assert len(set(found)) == 3 and found[0] == found[3]
    parts[0].write_text(parts[0].read_text().replace("good", "fine"))
    again = config_for(tmp_path, *({"path": str(part)} for part in parts))
    assert groups_of(again, tokenizer).fingerprint not in found


def test_the_report_has_every_part_and_the_total(tmp_path, tokenizer, parts):
    with parts[0].open("a") as file:
        file.write('{"prompt": "a:", "chosen": " b", "rejected": " b", "margin": 1}\n')
    described = {"path": str(parts[0]), "fraction": 0.5}, {"path": str(parts[1]), "fraction": 2.0}
    config = config_for(tmp_path, *described)
    groups, read = load_split(config.data, False, tokenizer)
    report = read()
    assert list(report) == ["train", "train 1", "train 2"]
    one, two, total = report["train 1"], report["train 2"], report["train"]
    assert (one["rows"], one["groups"], one["fraction"]) == (13, 6, 0.5)
    assert (two["rows"], two["groups"], two["fraction"]) == (8, 16, 2.0)
    assert one["dropped"] == total["dropped"] == {"chosen and rejected are the same tokens": 1}
    assert (total["rows"], total["groups"]) == (21, len(groups))
    assert total["tokens"] == one["tokens"] + two["tokens"] == groups.counts.lengths.sum()
    assert total["margin_mean"] == pytest.approx(groups.margins.mean())
    assert (total["margin_min"], total["margin_max"]) == (groups.margins.min(), groups.margins.max())


def test_without_a_fold_the_total_alone_is_of_what_is_trained_on(tmp_path, tokenizer, parts):
    config = config_for(tmp_path, *({"path": str(part)} for part in parts))
    _, read = training_groups(config, tokenizer)
    whole = read()
    config = config_for(tmp_path, *({"path": str(part)} for part in parts), data={"folds": 2, "fold": 1})
    groups, read = training_groups(config, tokenizer)
    report = read()
    assert [report[name] for name in ("train 1", "train 2")] == [whole["train 1"], whole["train 2"]]
    kept = {"groups": len(groups), "tokens": groups.counts.lengths.sum(), "without_fold": 1}
    assert report["train"] == whole["train"] | kept and len(groups) < whole["train"]["groups"]


def test_a_bad_row_is_named_by_its_own_file_and_line(tmp_path, tokenizer, parts):
    write_pairs(tmp_path / "third.jsonl", 3)
    with (tmp_path / "third.jsonl").open("a") as file:
        file.write('{"prompt": "a", "chosen": 3, "rejected": "c"}\n')
    config = config_for(tmp_path, {"path": str(parts[0])}, {"path": str(tmp_path / "third.jsonl")})
    with pytest.raises(ValueError, match=r"third\.jsonl:4: chosen: expected text"):
        groups_of(config, tokenizer)


def test_a_fraction_that_leaves_nothing_is_refused(tmp_path, tokenizer, parts):
    config = config_for(tmp_path, {"path": str(parts[0]), "fraction": 0.01})
    with pytest.raises(ValueError, match=r"first\.jsonl: fraction 0\.01 of 12 groups is none"):
        groups_of(config, tokenizer)


def test_held_out_rows_are_those_of_the_parts_that_name_some(tmp_path, tokenizer, parts):
    first, second = ({"path": str(part), "fraction": 0.5} for part in parts)
    config = config_for(tmp_path, first, {**second, "test_split": "test"}, train={"eval_steps": 1})
    held_out, read = load_split(config.data, True, tokenizer)
    report = read()
    assert len(held_out) == 5 and list(report) == ["test", "test 2"]
    assert report["test 2"]["fraction"] == 1.0, "a fraction is one of the training groups"
    without = config_for(tmp_path, first, second)
    assert load_data(without, tokenizer, training=True).held_out is None
    with pytest.raises(ValueError, match=r"data\.datasets: name the split to evaluate on, as test_split"):
        load_data(without, tokenizer, training=False)
    single = config_for(tmp_path, {**first, "test_split": "test"})
    with pytest.raises(ValueError, match="is a single file, so 'test' would be its training rows"):
        load_split(single.data, True, tokenizer)


def test_quantiles_and_mismatched_completions_are_of_the_mixture(tmp_path, tokenizer, parts):
    described = {"path": str(parts[0])}, {"path": str(parts[1]), "fraction": 2.5}
    config = config_for(tmp_path, *described, objective={"loss_type": "madpo", "tau": "quantile:0.5"})
    data = load_data(config, tokenizer, training=True)
    assert data.train is not None and len(data.train) == 32
    resolved: Any = resolve_quantiles(config, data, tokenizer, None)  # type: ignore[arg-type]
    assert resolved.objective.tau == pytest.approx(np.quantile(np.abs(data.train.margins), 0.5))
    kto = config_for(tmp_path, *described, objective={"loss_type": "kto"})
    groups = load_data(kto, tokenizer, training=True).train
    assert groups is not None and len(groups) == 32
    assert [len(groups[i].completions) for i in range(32)] == [4] * 32
    lengths = [len(groups[i].prompt) + sum(map(len, groups[i].completions)) for i in range(32)]
    assert groups.counts.lengths.tolist() == lengths


REFUSED = [
    ({"datasets": None}, r"data\.dataset_name: is required, or data\.datasets"),
    ({"dataset_name": "x"}, r"data: set one of dataset_name .* and datasets"),
    ({"datasets": []}, r"data\.datasets: "),
    ({"datasets": [{"path": "a", "fraction": 0.0}]}, r"data\.datasets\.0\.fraction: .*above 0"),
    ({"datasets": [{"fraction": 1}]}, r"data\.datasets\.0\.path: is required"),
    (
        {"datasets": [{"path": "a", "weight": 1}]},
        r"datasets\.0\.weight: unknown key; known here: adapter, columns, fraction",
    ),
    ({"datasets": [{"path": "a", "spilt": "x"}]}, r"datasets\.0\.spilt: unknown key, did you mean 'split'"),
    (
        {"datasets": [{"path": "a", "test_split": "train"}]},
        r"\.0\.test_split: it is the training split",
    ),
    ({"dataset_config": "x"}, r"data\.dataset_config: every part .* \[\{name: \.\.\.\}\]"),
    ({"dataset_train_split": "x"}, r"data\.dataset_train_split: every part .* \[\{split: \.\.\.\}\]"),
    ({"dataset_test_split": "x"}, r"data\.dataset_test_split: every part .* \[\{test_split: \.\.\.\}\]"),
]


@pytest.mark.parametrize("data, message", REFUSED, ids=[str(data)[:45] for data, _ in REFUSED])
def test_a_bad_description_of_a_mixture_names_the_key(tmp_path, data, message):
    tree = {
        "output_dir": "o",
        "model": {"model_name_or_path": "m"},
        "data": {"datasets": [{"path": "a"}], **data},
        "objective": {"loss_type": "dpo"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "config.yaml")


def test_a_mixture_survives_dump_and_load(tmp_path):
    config = config_for(tmp_path, {"path": "a", "fraction": 2}, {"path": "b", "test_split": "test"})
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


def test_annotate_takes_one_data_set_at_a_time(tmp_path):
    config = config_for(tmp_path, {"path": "a"}, objective={"loss_type": "bradley_terry"})
    with pytest.raises(ValueError, match=r"data\.datasets: annotate takes one data set at a time"):
        run_annotation(config)


@pytest.fixture
def run(tmp_path, tokenizer_folder, parts) -> Config:
    model = save_model(tmp_path / "start", tokenizer_folder, seed=1)
    return config_for(
        tmp_path,
        {"path": str(parts[0])},
        {"path": str(parts[1]), "test_split": "test"},
        model={"model_name_or_path": str(model)},
        optim={"lr": 3e-3},
        data={"order": "as_is"},
    )


def changed(config: Config, **sections: Any) -> Config:
    tree = config.model_dump(by_alias=True)
    for section, values in sections.items():
        tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    return Config.model_validate(tree)


def train(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")


def probe(shard, config: Config) -> None:
    run_probe(config)


def weights(config: Config) -> bytes:
    return (Path(config.output_dir) / "model" / "model.safetensors").read_bytes()


@pytest.mark.ranks
def test_a_mixture_trains_to_the_same_bits_as_the_file_made_by_hand(run, tmp_path):
    by_hand = tmp_path / "both"
    by_hand.mkdir()
    rows = (tmp_path / "first.jsonl").read_text() + (tmp_path / "rows.jsonl").read_text()
    (by_hand / "train.jsonl").write_text(rows)
    (by_hand / "test.jsonl").write_bytes((tmp_path / "second" / "test.jsonl").read_bytes())
    plain = {"datasets": None, "dataset_name": str(by_hand), "dataset_test_split": "test"}
    single = changed(run, output_dir=str(tmp_path / "single"), data=plain)
    run_ranks(2, train, run)
    run_ranks(2, train, single)
    assert weights(run) == weights(single)
    card = (Path(run.output_dir) / "model" / "README.md").read_text()
    assert f"on `{tmp_path / 'first.jsonl'}`, `{tmp_path / 'second'}`." in card
    run_ranks(2, probe, run)
    found = json.loads((Path(run.output_dir) / "probe.json").read_text())
    assert found["groups"] == 20 and found["of"]["data"].startswith("mixture-")


@pytest.mark.ranks
def test_another_fraction_is_another_run_and_a_moved_file_is_not(run, tmp_path):
    run = changed(run, train={"max_steps": 1, "export": False})
    run_ranks(1, train, run)
    first, second = (part.model_dump() for part in run.data.datasets or [])
    moved = tmp_path / "elsewhere.jsonl"
    Path(first["path"]).rename(moved)
    run_ranks(1, train, changed(run, data={"datasets": [{**first, "path": str(moved)}, second]}))
    other = changed(run, data={"datasets": [{**first, "path": str(moved), "fraction": 0.5}, second]})
    with pytest.raises(AssertionError, match=r"data \(content\): '20 groups, mixture-.*'14 groups, mixture-"):
        run_ranks(1, train, other)
