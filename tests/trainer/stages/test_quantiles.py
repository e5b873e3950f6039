"""Thresholds as quantiles of the training set, the order from easy to hard, and the probe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harness import make_config, run_ranks, save_model, write_pairs
from plain import padded_logps

from madpo.trainer.config.schema import Config
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.data.training_data import load_data
from madpo.trainer.dist import Shard
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives import build
from madpo.trainer.objectives.madpo import MADPOParams
from madpo.trainer.objectives.sft import ThresholdedParams
from madpo.trainer.stages.evaluate import run_evaluation
from madpo.trainer.stages.probe import Probe, run_probe, show
from madpo.trainer.stages.quantiles import resolve_quantiles
from madpo.trainer.stages.train import run_training


def test_quantiles_become_numbers_on_the_parameters_own_scale():
    margins = np.array([-4.0, -1.0, 1.0, 2.0, 3.0])
    params = MADPOParams.model_validate({"tau": "quantile:0.5", "margin_scale": 10.0, "lambda": 2.0})
    assert params.quantiles == {"tau": 0.5}
    assert params.resolve(margins) == MADPOParams.model_validate(
        {"tau": 20.0, "margin_scale": 10.0, "lambda": 2.0}
    )
    with pytest.raises(ValueError, match="above 0"):
        params.resolve(np.zeros(3))
    terms = [{"loss_type": "dpo"}, {"loss_type": "mixdpo", "threshold": "quantile:0.25"}]
    total = build("weighted_sum", terms=terms, loss_weights=[1.0, 0.5]).params
    assert total.quantiles == {"terms.1.threshold": 0.25}
    resolved: Any = total.resolve(margins)
    assert resolved.terms[1]["threshold"] == pytest.approx(-1.0) and resolved.loss_weights == [1.0, 0.5]
    probabilities = np.linspace(0, 1, 101)
    assert (
        ThresholdedParams.model_validate({"threshold": "quantile:.25"}).resolve(probabilities).threshold
        == 0.25
    )


@pytest.mark.parametrize("bad", ["quantile:1.5", "quantile:0.0", "quantile:", "0.5", "median", -1.0, 0, True])
def test_what_is_neither_number_nor_quantile_is_refused(bad):
    with pytest.raises(ValueError):
        MADPOParams.model_validate({"tau": bad})


def test_of_tied_margins_all_are_difficult():
    """A quarter of the margins is the smallest: a tenth cannot be had, none would be no MixDPO."""
    margins = np.array([0.5] * 5 + list(range(1, 16)), dtype=float)
    params: Any = build("mixdpo", threshold="quantile:0.1").params.resolve(margins)
    assert (margins < params.threshold).sum() == 5


def test_margins_that_are_all_0_have_no_quantile_above_0(tmp_path, tokenizer_folder):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "good", "chosen": f" x {n}", "rejected": f" y {n}", "margin": 0} for n in range(4)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = {"init_config": {"model_type": "llama"}, "tokenizer_name_or_path": str(tokenizer_folder)}
    objective = {"loss_type": "madpo", "tau": "quantile:0.8"}
    config = make_config(
        tmp_path,
        {
            "model": {**model, "ref_model_name_or_path": "unread"},
            "data": {"dataset_name": str(file), "max_length": 32, "cache_dir": str(tmp_path / "cache")},
            "objective": objective,
        },
    )
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, True)
    with pytest.raises(ValueError) as caught:
        resolve_quantiles(config, data, tokenizer, Shard(0, 1))
    assert str(caught.value).startswith(
        "objective: tau quantile:0.8 is 0 in this data; expected a number above 0"
    )
    assert str(caught.value).endswith("all margins are 0, so no pair has a weight of its own: use dpo")


def test_outside_a_run_a_quantile_has_no_meaning():
    from madpo.trainer.objectives import EdgeScores

    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match=r"quantile:0\.1 is taken of a run's training set; give a number"):
        build("mixdpo", threshold="quantile:0.1")(
            EdgeScores(zeros, zeros, zeros, zeros, zeros.long(), zeros.long(), zeros)
        )


def test_easy_to_hard_is_an_order_like_any_other():
    """Falling ease in every epoch; ties shuffled, differently each time; any range can be asked for."""
    ease = np.array([1.0, 5.0, 3.0, 3.0, 3.0, 3.0, 9.0, -2.0])
    order = DataOrder(8, seed=3, ease=ease)
    whole = order.take(0, 40)
    for epoch in whole.reshape(5, 8):
        assert sorted(epoch) == list(range(8))
        assert (np.diff(ease[epoch]) <= 0).all()
    assert len({tuple(epoch) for epoch in whole.reshape(5, 8)}) > 1
    again = DataOrder(8, seed=3, ease=ease)
    assert np.concatenate([again.take(p, 5) for p in range(0, 40, 5)]).tolist() == whole.tolist()


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    write_pairs(tmp_path / "pairs" / "train.jsonl", 30)
    write_pairs(tmp_path / "pairs" / "test.jsonl", 20, seed=5)
    model = save_model(tmp_path / "start", tokenizer_folder, seed=1)
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(tmp_path / "pairs"), "dataset_test_split": "test"},
            "objective": {"loss_type": "mixdpo", "threshold": "quantile:0.3"},
            "train": {"export": False},
        },
    )


def train(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")


def groups_of(config: Config, supervised: bool) -> Any:
    return load_groups(config.data, "train", load_tokenizer(config.model), supervised)[0]


def objective_in(folder: str) -> dict[str, Any]:
    return yaml.safe_load((Path(folder) / "config.yaml").read_text())["objective"]


def margins_in(config: Config, split: str) -> list[float]:
    lines = Path(str(config.data.dataset_name), f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line)["margin"] for line in lines]


def test_groups_by_file_and_by_margin(config):
    groups = groups_of(config, supervised=False)
    rows = margins_in(config, "train")
    assert groups.ease("easy_to_hard").tolist() == rows
    assert DataOrder(30, 0, groups.ease("as_is")).take(28, 4).tolist() == [28, 29, 0, 1]
    assert groups.ease("shuffled") is None


@pytest.mark.ranks
def test_the_share_of_difficult_pairs_is_the_quantile(config):
    """30 pairs, of which the 9 of smallest margin are imitated; evaluation uses the training set's number."""
    pairs = Path(config.data.dataset_name)
    run_ranks(2, train, config)
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").open()]
    sizes = [8, 8, 8, 6]
    shares = [line["mixdpo/difficult"] for line in lines if "loss" in line]
    assert sum(share * size for share, size in zip(shares, sizes, strict=True)) == pytest.approx(9)
    margins = groups_of(config, supervised=False).margins
    threshold = objective_in(config.output_dir)["threshold"]
    assert sorted(margins)[8] < threshold <= sorted(margins)[9]

    # Other data, other quantile; the checkpoint's number counts.
    shutil.copy(pairs / "test.jsonl", pairs / "other.jsonl")
    data = config.data.model_copy(update={"dataset_train_split": "other"})
    run_ranks(2, evaluate, config.model_copy(update={"data": data}))
    record = json.loads((Path(config.output_dir) / "evaluation.json").read_text())
    held_out = margins_in(config, "test")
    assert record["eval_mixdpo/difficult"] == pytest.approx(np.mean(np.array(held_out) < threshold))


def evaluate(shard, config: Config) -> None:
    run_evaluation(config)


@pytest.mark.ranks
def test_a_quantile_of_probabilities_is_measured_once_and_kept(config):
    """By the starting model; a continuation finds the number, though its model knows better by then."""
    thresholded = {"loss_type": "thresholded_nll", "threshold": "quantile:0.25"}
    config = Config.model_validate({**config.model_dump(by_alias=True), "objective": thresholded})
    run_ranks(2, train, config)
    kept = (Path(config.output_dir) / "probe.json").read_bytes()
    first = objective_in(config.output_dir)["threshold"]
    want = np.exp(plain_logps(config))
    assert first == pytest.approx(np.quantile(want, 0.25), rel=1e-4)
    marked = json.loads(kept)
    marked["percentiles"] = [0.5 + x / 2 for x in marked["percentiles"]]
    (Path(config.output_dir) / "probe.json").write_text(json.dumps(marked))
    again = Config.model_validate({**config.model_dump(by_alias=True), "output_dir": config.output_dir})
    with pytest.raises(AssertionError, match=r"objective\.threshold"):
        run_ranks(2, train, again)  # the number is read, not measured again
    (Path(config.output_dir) / "probe.json").write_bytes(kept)
    longer = {**config.model_dump(by_alias=True), "train": {**config.train.model_dump(), "save_steps": 1}}
    run_ranks(2, train, Config.model_validate(longer))
    assert (Path(config.output_dir) / "probe.json").read_bytes() == kept
    assert objective_in(config.output_dir)["threshold"] == first


def plain_logps(config: Config) -> np.ndarray:
    """The log-probs of all chosen completions' tokens, by the padded forward of transformers."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(config.model.model_name_or_path))
    groups = groups_of(config, supervised=True)
    with torch.no_grad():
        return padded_logps(model, [groups[i] for i in range(len(groups))], tokens=True).double().numpy()


def probe(shard, config: Config) -> None:
    run_probe(config)


@pytest.mark.ranks
def test_the_probe_is_what_plain_transformers_gives(config, capsys):
    """For a preference data set, whatever its order: the chosen completions."""
    data = config.data.model_copy(update={"order": "easy_to_hard"})
    run_ranks(2, probe, config.model_copy(update={"data": data}))
    found = Probe(**json.loads((Path(config.output_dir) / "probe.json").read_text()))
    logps = plain_logps(config)
    assert (found.groups, found.tokens) == (30, len(logps))
    assert found.mean_probability == pytest.approx(np.exp(logps).mean(), rel=1e-4)
    assert found.nll == pytest.approx(-logps.mean(), rel=1e-5)
    np.testing.assert_allclose(
        found.percentiles, np.quantile(np.exp(logps), np.linspace(0, 1, 101)), rtol=1e-3
    )
    assert 0 < found.standard_error < 0.05
    assert found.capability == "weak"
    show(found, Path("runs/x/probe.json"))
    text = capsys.readouterr().out
    assert "suggested objective: {loss_type: nll}" in text and "below 0.25" in text
