"""Reward models: the objective by hand, packed scores against plain transformers, a run and its export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import LLAMA, make_config, plain_scores, run_ranks, save_classifier, save_model, write_pairs
from kernel_cases import relative_error
from plain import plain_optimizer, zero3_steps

from madpo.trainer.config.schema import Config
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.build import build_module
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives import EdgeScores, build
from madpo.trainer.stages.annotate import run_annotation
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.stages.train import run_training

BATCH = 7


def test_bradley_terry_by_hand():
    won, lost, margin = torch.tensor([[1.5], [0.25], [0.5]], dtype=torch.float64)
    scores = EdgeScores(won, lost, margins=margin)
    assert build("bradley_terry")(scores).item() == pytest.approx(math.log1p(math.exp(-1.25)))
    assert build("bradley_terry", margin=True)(scores).item() == pytest.approx(math.log1p(math.exp(-0.75)))
    centred = build("bradley_terry", center_rewards_coefficient=0.01)(scores).item()
    assert centred == pytest.approx(math.log1p(math.exp(-1.25)) + 0.01 * 1.75**2)
    assert build("bradley_terry").needs == {"scores"}
    assert build("bradley_terry", margin=True).needs == {"scores", "margins"}


@pytest.fixture
def config(tmp_path, tokenizer_folder) -> Config:
    """A start with a score layer, so that plain transformers begins with the same weights."""
    model = save_classifier(tmp_path / "start", tokenizer_folder)
    write_pairs(tmp_path / "pairs" / "train.jsonl", 40)
    write_pairs(tmp_path / "pairs" / "test.jsonl", 12, seed=3)
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(model)},
            "data": {"dataset_name": str(tmp_path / "pairs"), "dataset_test_split": "test"},
            "objective": {"loss_type": "bradley_terry", "margin": True, "center_rewards_coefficient": 0.05},
            "optim": {"lr": 3e-3},
            "train": {"global_batch_size": BATCH, "num_train_epochs": 3},
        },
    )


@pytest.mark.ranks
def test_steps_equal_plain_transformers(config):
    """Two ranks, several micro-batches: losses and gradients of two steps."""
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(str(config.model.model_name_or_path))
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    order = DataOrder(len(groups), config.seed)
    small = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_tokens": 128})})
    optimizer = plain_optimizer(model, config)
    for step, (loss, gradients) in enumerate(run_ranks(2, zero3_steps, small, 2)[0]):
        batch = [groups[index] for index in order.take(step * BATCH, BATCH)]
        won, lost = plain_scores(model, batch).view(-1, 2).unbind(1)
        margins = torch.tensor([group.edges[0][2] for group in batch])
        want = (-F.logsigmoid(won - lost - margins) + 0.05 * (won + lost).square()).mean()
        optimizer.zero_grad()
        want.backward()
        assert loss == pytest.approx(want.item(), rel=1e-5)
        for name, parameter in model.named_parameters():
            assert relative_error(gradients[name], parameter.grad) < 1e-4, name
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.max_grad_norm)
        optimizer.step()


@pytest.mark.ranks
def test_a_run_learns_and_exports_a_classifier(config):
    from transformers import AutoModelForSequenceClassification

    run_ranks(2, train, config)
    folder = Path(config.output_dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert training[-1]["rewards/accuracies"] > 0.9 > 0.8 > training[0]["rewards/accuracies"]
    assert training[-1]["loss"] < training[0]["loss"]
    assert "logps/chosen" not in training[-1] and "rewards/length_correlation" in training[-1]

    exported: Any = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    held_out = load_data(config, load_tokenizer(config.model), training=False).held_out
    assert held_out is not None
    with torch.no_grad():
        scores = plain_scores(exported, [held_out[i] for i in range(len(held_out))]).view(-1, 2)
    evaluation = next(line for line in reversed(lines) if "eval_loss" in line)
    assert evaluation["eval_rewards/chosen"] == pytest.approx(scores[:, 0].mean().item(), rel=1e-4)
    accuracy = (scores[:, 0] > scores[:, 1]).double().mean().item()
    assert evaluation["eval_rewards/accuracies"] == pytest.approx(accuracy)


def train(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")


@pytest.mark.ranks
def test_annotation_gives_the_next_stage_its_margins(config, tmp_path, tokenizer_folder, capsys):
    """Reward model, margins, margin-weighted DPO. A row that cannot be scored is not there."""
    from transformers import AutoModelForSequenceClassification

    pairs = Path(config.data.dataset_name)
    with (pairs / "train.jsonl").open("a") as file:
        file.write('{"prompt": "p", "chosen": " same", "rejected": " same", "margin": 7}\n{broken\n\n')
        file.write('{"prompt": "p", "chosen": " a", "rejected": " b", "margin": 1, "score_chosen": "x"}\n')
    config = Config.model_validate(
        {**config.model_dump(by_alias=True), "data": {**config.data.model_dump(), "on_bad_row": "drop"}}
    )
    run_ranks(2, train_and_annotate, config)
    folder = Path(config.output_dir)
    rows = [json.loads(line) for line in (folder / "annotated" / "train.jsonl").read_text().splitlines()]
    source = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()[:40]]
    assert len(rows) == 41
    assert rows[40]["score_chosen_given"] == "x" and rows[40]["margin_given"] == 1

    exported: Any = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    with torch.no_grad():
        scores = plain_scores(exported, [groups[i] for i in range(40)]).view(-1, 2)
    for row, before, (chosen, rejected) in zip(rows, source, scores.tolist(), strict=False):
        assert {key: row[key] for key in ("prompt", "chosen", "rejected")} == {
            key: before[key] for key in ("prompt", "chosen", "rejected")
        }
        assert row["margin_given"] == before["margin"]
        assert row["score_chosen"] == pytest.approx(chosen, rel=1e-4, abs=1e-5)
        assert row["margin"] == pytest.approx(chosen - rejected, rel=1e-3, abs=1e-4)
    facts = json.loads((folder / "annotated" / "annotation.json").read_text())
    assert facts["train"]["scored"] == 41 and facts["test"]["rows"] == 12
    assert facts["train"]["accuracy"] > 0.9

    tree = config.model_dump(by_alias=True)
    tree["model"]["model_name_or_path"] = str(save_model(tmp_path / "policy", tokenizer_folder, seed=2))
    tree["output_dir"] = str(tmp_path / "madpo")
    tree["data"]["dataset_name"] = str(folder / "annotated")
    tree["objective"] = {"loss_type": "madpo", "tau": "quantile:0.8"}
    tree["train"] |= {"max_steps": 2, "export": False}
    run_ranks(2, train, Config.model_validate(tree))


def train_and_annotate(shard, config: Config) -> None:
    run_training(config, "madpo train test.yaml")
    run_annotation(config)


@pytest.mark.ranks
def test_a_random_layer_annotates_nothing(config, tmp_path, tokenizer_folder):
    model = save_model(tmp_path / "language-model", tokenizer_folder, seed=2)
    tree = config.model_dump(by_alias=True)
    tree["model"]["model_name_or_path"] = str(model)
    with pytest.raises(AssertionError, match=r"no checkpoint, and .* is no reward model; train first"):
        run_ranks(2, annotate, Config.model_validate(tree))


def annotate(shard, config: Config) -> None:
    run_annotation(config)


@pytest.mark.ranks
def test_the_export_scores_the_last_token_even_if_padding_was_to_be_eos(config, tmp_path):
    """Many tokenizers pad with EOS. Transformers would take EOS for padding and score the token before."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(str(config.model.model_name_or_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    description = json.loads((folder / "config.json").read_text())
    description["pad_token_id"] = description["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(description))
    short = config.model_dump(by_alias=True)
    short["train"] |= {"max_steps": 3}
    run_ranks(2, train, Config.model_validate(short))
    exported: Any = AutoModelForSequenceClassification.from_pretrained(Path(config.output_dir) / "model")
    padding = AutoTokenizer.from_pretrained(Path(config.output_dir) / "model").pad_token_id
    assert padding == exported.config.pad_token_id != tokenizer.eos_token_id
    held_out = load_data(config, load_tokenizer(config.model), training=False).held_out
    assert held_out is not None
    rows = [group.prompt + c for group in map(held_out.__getitem__, range(12)) for c in group.completions]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        scores = exported(input_ids=ids, attention_mask=mask).logits[:, 0].view(-1, 2)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    evaluation = next(line for line in map(json.loads, reversed(lines)) if "eval_loss" in line)
    assert evaluation["eval_rewards/chosen"] == pytest.approx(scores[:, 0].mean().item(), rel=1e-4)


def test_annotation_wants_a_reward_run(config):
    tree = {**config.model_dump(by_alias=True), "objective": {"loss_type": "dpo"}}
    with pytest.raises(ValueError, match="annotate takes the config of a reward run"):
        run_annotation(Config.model_validate(tree))


def new_layer(shard, config: Config) -> list[torch.Tensor]:
    """The score layer (1, H) as a run finds it, then what the run of the same seed exports."""
    import deepspeed
    from safetensors.torch import load_file

    engine = start_engine(config, load_tokenizer(config.model), training=True)
    with deepspeed.zero.GatheredParameters([engine.module.head.weight]):
        start = engine.module.head.weight.detach().clone()
    engine.release()
    run_training(config, "madpo train test.yaml")
    exported = load_file(Path(config.output_dir) / "model" / "model.safetensors")
    return [start, exported["score.weight"]]


@pytest.mark.ranks
def test_a_language_model_gets_a_new_score_layer(config, tmp_path, tokenizer_folder):
    """Random by the run's seed, the same on all ranks, trained and exported."""
    model = save_model(tmp_path / "language-model", tokenizer_folder, seed=2)
    tree = config.model_dump(by_alias=True)
    tree["model"]["model_name_or_path"] = str(model)
    tree["train"] |= {"max_steps": 2}
    tree["data"] |= {"dataset_test_split": None}
    tree["objective"] = {"loss_type": "bradley_terry"}
    first, second = run_ranks(2, new_layer, Config.model_validate(tree))
    start, trained = first
    assert start.shape == trained.shape == (1, LLAMA["hidden_size"]) and start.std() > 0
    for here, there in zip(first, second, strict=True):
        assert torch.equal(here, there)
    moved = (trained - start).abs()
    assert moved.min() > 0 and moved.max() < 3 * config.optim.lr  # two steps of Adam move every weight
    seeds = [Config.model_validate({**tree, "seed": seed}) for seed in (42, 42, 43)]
    (layers,) = run_ranks(1, first_layers, seeds)
    assert torch.equal(layers[0], layers[1]) and not torch.equal(layers[0], layers[2])


def first_layers(shard, configs: list[Config]) -> list[torch.Tensor]:
    """The score layers (1, H) that models of these configs begin with."""
    modules: list[Any] = [build_module(config, load_tokenizer(config.model)) for config in configs]
    return [module.head.weight.detach().clone() for module in modules]
