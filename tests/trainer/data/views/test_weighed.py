"""Pairs seen through their weights: skipped at weight 0, left out where light, drawn by weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_config, run_ranks, save_model, sentence

from madpo.kernels.token_scores import TokenScores
from madpo.trainer import loop
from madpo.trainer.batches.steps import StepRules, plan_step
from madpo.trainer.config.schema import Config
from madpo.trainer.data.order import DataOrder, systematic_draws
from madpo.trainer.data.training_data import load_data, weighed
from madpo.trainer.data.training_source import DatasetSource
from madpo.trainer.data.views.trimmed import SelectedDataset, TrimmedDataset
from madpo.trainer.data.views.weighed import draw_by_weight, skip_weightless, weights_of
from madpo.trainer.dist import Shard
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import Item
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.state import TrainState

STEEP = {"loss_type": "madpo", "c_max": 1000.0, "lambda": 10.0}
"""Under which a pair of margin -4 has weight e^-3996, which is 0 in float64."""
ALONE = Shard(0, 1)
RULES = StepRules(Item.EDGE, 512)


LOSSES = {"loss", "grad_norm", "eval_loss"}


def rows_with(margins: list[float], prompts: int | None = None) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    starts = [f"{index} {sentence(random)}:" for index in range(prompts or len(margins))]
    return [
        {
            "prompt": starts[index % len(starts)],
            "chosen": f" a{index} {sentence(random)}",
            "rejected": f" b {sentence(random)}",
            "margin": margin,
        }
        for index, margin in enumerate(margins)
    ]


def config_for(folder: Path, tokenizer: Path, rows: list[Any], objective: Any = None, **tree: Any) -> Config:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_name": str(path), "max_length": 96, "merge_prompts": True}
    tree["data"] = {**data, **tree.get("data", {})}
    tree["model"] = {"model_name_or_path": str(tokenizer), **tree.get("model", {})}
    return make_config(folder, {"objective": objective or {"loss_type": "madpo"}, **tree})


def data_of(config: Config) -> Any:
    return weighed(load_data(config, load_tokenizer(config.model), training=True), config)


def unweighed(config: Config) -> Any:
    return load_data(config, load_tokenizer(config.model), training=True).train


MIXED = [1.0, -4.0, 0.5, -4.0, -4.0, 2.0, -4.0, 0.3, -4.0, -4.0, -4.0, -4.0, 1.5, -4.0, -4.0, -4.0]
"""In steps of four in this order the third has no pair that weighs anything, the last a single one."""


def losses_and_gradients(shard: Shard, config: Config, skips: bool) -> list[Any]:
    """(record, gradient norm) of every step of a run in the file's order, and the evaluation's record."""
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, tokenizer, training=True)
    data = weighed(data, config) if skips else data
    engine, records = start_engine(config, tokenizer, training=True), list[Any]()
    assert data.source is not None
    saver = loop.Unsaved()
    loop.train(config, engine, data.source, data.train, shard, TrainState(), saver, records.append)
    weights = [parameter.detach().clone() for parameter in _whole(engine.module.policy)]
    engine.release()
    return [records, weights] if shard.is_main else []


def _whole(model: Any) -> Any:
    import deepspeed

    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data.clone()


@pytest.mark.ranks
def test_what_weighs_nothing_is_not_computed_and_changes_nothing(tmp_path, tokenizer_folder):
    """Steps on two ranks, one of them without any pair to compute and one with a pair for one rank only:
    the same losses, gradients and weights, and fewer tokens."""
    model = save_model(tmp_path / "model", tokenizer_folder, seed=1)
    reference = save_model(tmp_path / "reference", tokenizer_folder, seed=2)
    config = config_for(
        tmp_path,
        tokenizer_folder,
        rows_with(MIXED),
        STEEP,
        model={"model_name_or_path": str(model), "ref_model_name_or_path": str(reference)},
        data={"order": "as_is"},
        train={"global_batch_size": 4, "logging_steps": 1},
    )
    (plain, weights), _ = run_ranks(2, losses_and_gradients, config, False)
    (skipping, same_weights), _ = run_ranks(2, losses_and_gradients, config, True)
    assert [record.get("data/skipped_edges") for record in skipping] == [2, 2, 4, 3, None]
    assert not any("data/skipped_edges" in record for record in plain)
    for before, after in zip(plain, skipping, strict=True):
        assert after.keys() & LOSSES == before.keys() & LOSSES
        for name in before.keys() & LOSSES:
            assert after[name] == pytest.approx(before[name], rel=1e-5), (name, after["step"])
    assert skipping[2]["loss"] == skipping[2]["grad_norm"] == 0
    assert "rewards/margins" not in skipping[2] and "rewards/margins" in skipping[1]
    assert skipping[3]["num_tokens"] < plain[3]["num_tokens"] / 2
    for before, after in zip(weights, same_weights, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_of_a_group_that_is_kept_in_part_only_what_its_edges_compare_is_left(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder, rows_with([1.0, 2.0, -4.0, -4.0, 0.5, -4.0], 2), STEEP)
    whole, train = unweighed(config), data_of(config).train
    assert len(whole) == len(train) == 2 and isinstance(train, TrimmedDataset)
    assert whole.counts.edges.tolist() == train.counts.counted_edges.tolist() == [
        3,
        3,
    ] and train.counts.edges.tolist() == [2, 1]
    for index, kept in ((0, [0, 2]), (1, [0])):
        group, before = train[index], whole[index]
        told = [(group.completions[w], group.completions[x], margin) for w, x, margin in group.edges]
        edges = [before.edges[k] for k in kept]
        assert told == [(before.completions[w], before.completions[x], margin) for w, x, margin in edges]
        assert len(group.completions) == train.counts.sequences[index] == 2 * len(kept)
        assert train.counts.lengths[index] == len(group.prompt) + sum(map(len, group.completions))
        assert train.counts.labelled[index] == len(group.labels) == len(group.completions)
    assert train.margins.tolist() == [1.0, 0.5, 2.0]
    step = plan_step(train, np.arange(2), RULES, ALONE)
    assert step.batches[0].scale == 1 / 6 and (step.num_edges, step.skipped_items) == (3, 3)


def test_a_stream_skips_too(tmp_path, tokenizer_folder):
    config = config_for(
        tmp_path,
        tokenizer_folder,
        rows_with(MIXED),
        STEEP,
        data={"streaming": True, "stream_block": 5, "order": "as_is"},
        train={"max_steps": 2},
    )
    source = data_of(config).source
    groups, indices = source.take(0, 12)
    assert groups.counts.counted_edges[indices].tolist() == [1] * 12
    assert groups.counts.edges[indices].tolist() == [int(margin > 0) for margin in MIXED[:12]]
    assert plan_step(groups, indices, RULES, ALONE).skipped_items == 8


def test_light_pairs_are_left_out_and_told(tmp_path, tokenizer_folder):
    margins = [-2.0, 0.5, 8.0, -1.0, 3.0, -6.9]
    config = config_for(tmp_path, tokenizer_folder, rows_with(margins, 4), data={"min_weight": 0.5})
    weights = config.objective.weight(torch.tensor(margins, dtype=torch.float64)).numpy()
    data = data_of(config)
    assert sorted(data.train.margins.tolist()) == sorted(np.array(margins)[weights >= 0.5].tolist())
    assert data.train.counts.edges.tolist() == data.train.counts.counted_edges.tolist()
    report = data.source.report()["train"]
    assert report["pairs_below_min_weight"] == (weights < 0.5).sum() > 0
    assert report["share_of_weight_below"] == pytest.approx(weights[weights < 0.5].sum() / weights.sum())
    assert report["groups"] == len(data.train) == data.source.num_groups
    with pytest.raises(
        ValueError, match=r"min_weight: 5 is above the weight of every pair .* largest is 1\.4"
    ):
        data_of(config_for(tmp_path, tokenizer_folder, rows_with(margins), data={"min_weight": 5.0}))


@pytest.mark.parametrize("key", [{"min_weight": 0.1}, {"sampling": "weight"}])
def test_what_weights_cannot_be_had_for_is_refused(tmp_path, tokenizer_folder, key):
    name = next(iter(key))
    for objective in ({"loss_type": "dpo"}, {"loss_type": "mixdpo"}):
        with pytest.raises(
            ValueError, match=rf"data\.{name}: no row .* has a weight, .* give a column weight"
        ):
            data_of(config_for(tmp_path, tokenizer_folder, rows_with([1.0, 2.0]), objective, data=key))
    with pytest.raises(ValueError, match=rf"data\.{name}: .* a stream never has"):
        config_for(tmp_path, tokenizer_folder, [], data={**key, "streaming": True}, train={"max_steps": 1})


def test_drawing_by_weight_needs_weights_and_a_shuffled_order(tmp_path, tokenizer_folder):
    with pytest.raises(ValueError, match=r"sampling: weight draws at random; set data\.order=shuffled"):
        config_for(tmp_path, tokenizer_folder, [], data={"sampling": "weight", "order": "easy_to_hard"})
    config = config_for(
        tmp_path, tokenizer_folder, rows_with([-4.0, -4.0]), STEEP, data={"sampling": "weight"}
    )
    with pytest.raises(ValueError, match=r"data\.sampling: all of .* has weight 0"):
        data_of(config)


def test_draws_are_in_proportion_to_the_weights_and_as_even_as_can_be():
    weights = np.array([0.0, 3.0, 1.0, 0.5, 0.0, 1.5, 0.1, 0.0])
    expected = len(weights) * weights / weights.sum()
    counts = [np.bincount(systematic_draws(weights, 7, epoch), minlength=8) for epoch in range(4000)]
    for count in counts:
        assert count.sum() == 8 and (np.abs(count - expected) < 1).all()
    np.testing.assert_allclose(np.mean(counts, 0), expected, atol=4 * 0.5 / 4000**0.5)
    equal = systematic_draws(np.ones(1000), 7, 3)
    assert equal.tolist() == list(range(1000))


def test_the_draws_of_an_epoch_follow_from_seed_and_epoch_alone():
    weights = np.random.default_rng(0).exponential(size=50)
    whole = DataOrder(50, seed=3, weights=weights).take(0, 200)
    again = DataOrder(50, seed=3, weights=weights)
    assert (
        np.concatenate([again.take(at, 7) for at in range(196, -1, -7)][::-1])[:200].tolist()
        == whole.tolist()
    )
    assert (
        whole[:50].tolist()
        != whole[50:100].tolist()
        != DataOrder(50, 4, weights=weights).take(50, 50).tolist()
    )
    assert sorted(whole[:50]) != whole[:50].tolist()  # shuffled


def gradient(
    groups: Any, indices: Any, config: Config, seed: int = 5, rules: StepRules = RULES
) -> torch.Tensor:
    """The gradient of a step's loss in a table of log-probs by token, which stands for a model."""
    table = torch.from_numpy(np.random.default_rng(seed).normal(-3, 1, (2, 400))).requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for batch in plan_step(groups, np.asarray(indices), rules, ALONE).batches:
        scored = batch.scored(TokenScores(table[0, batch.targets], table[1, batch.targets].detach()))
        total = total + batch.scale * config.bound_objective.of_groups(scored).losses.sum()
    return torch.autograd.grad(total, table)[0][0]


SPREAD = [0.5, -1.0, 8.0, -2.5, 3.0, -0.2, 1.0, -8.0, -3.0]


@pytest.mark.parametrize("prompts", [9, 4], ids=["pairs", "groups of two and three"])
def test_the_expectation_of_a_drawn_step_is_the_weighted_loss(tmp_path, tokenizer_folder, prompts):
    """Over all groups that a position may hold, with their probabilities: the gradient of all pairs, weighted
    as in the paper. And over the shifts of an epoch's draws."""
    config = config_for(tmp_path, tokenizer_folder, rows_with(SPREAD, prompts))
    groups = unweighed(config)
    assert len(groups) == prompts
    drawn, of_groups = draw_by_weight(groups, config.bound_objective)
    truth = gradient(groups, range(prompts), config)
    chances = of_groups / of_groups.sum()
    each = torch.stack([gradient(drawn, [group], config) for group in range(prompts)])
    torch.testing.assert_close(torch.from_numpy(chances) @ each, truth, rtol=1e-10, atol=1e-12)
    order = DataOrder(prompts, seed=1, weights=of_groups)
    first, second = order.take(6, 2)
    torch.testing.assert_close(gradient(drawn, [first, second], config), (each[first] + each[second]) / 2)
    shares = np.bincount(order.take(0, 2000 * prompts), minlength=prompts) / (2000 * prompts)
    error = (torch.from_numpy(shares) @ each - truth).norm() / truth.norm()
    assert error < 0.02
    assert gradient(drawn, [int(chances.argmax())], config).norm() > 0


def test_merged_pairs_of_a_group_keep_their_relative_weights(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder, rows_with(SPREAD, 4), data={"sampling": "weight"})
    groups = unweighed(config)
    data = data_of(config)
    weights = weights_of(groups, config.bound_objective)
    assert weights is not None
    firsts = np.cumsum(groups.counts.edges) - groups.counts.edges
    for index, (first, count) in enumerate(zip(firsts, groups.counts.edges, strict=True)):
        own = weights[first : first + count]
        assert data.train[index].edge_weights == pytest.approx([weights.mean() / own.sum()] * count)
    assert data.train.counts.counted_edges.tolist() == [1] * 4 and isinstance(data.source, DatasetSource)
    assert data.source.num_groups == 4


def test_held_out_pairs_are_weighted_as_ever(tmp_path, tokenizer_folder):
    rows = rows_with(SPREAD)
    (tmp_path / "folder").mkdir()
    for split in ("train", "test"):
        (tmp_path / "folder" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = {"sampling": "weight", "min_weight": 0.5, "dataset_name": str(tmp_path / "folder")}
    config = config_for(tmp_path, tokenizer_folder, rows, data={**both, "dataset_test_split": "test"})
    data = data_of(config)
    assert not isinstance(data.held_out, TrimmedDataset) and len(data.held_out) == 9
    assert data.held_out[0].edge_weights == [] and data.train[0].edge_weights != []


def test_weights_that_are_all_positive_change_nothing(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder, rows_with(SPREAD))
    groups = unweighed(config)
    assert skip_weightless(groups, config.bound_objective) is groups


ROW_WEIGHTS = [0.5, 0.0, 2.0, 1.0, 0.0, 3.0, None, 0.25]


def rows_with_weights(label: Any = None) -> list[dict[str, Any]]:
    """Pairs whose prompts and weights repeat; with `label`, their chosen completions alone."""
    rows = [row | {"weight": x} for row, x in zip(rows_with([1.0] * 8, 5), ROW_WEIGHTS, strict=True)]
    if label is None:
        return rows
    return [
        {"prompt": x["prompt"], "completion": x["chosen"], "label": label(i), "weight": x["weight"]}
        for i, x in enumerate(rows)
    ]


FACTORS = np.array([1.0 if x is None else x for x in ROW_WEIGHTS])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("loss", ["madpo", "dpo", "simpo", "apo_zero_unpaired", "nll"])
def test_a_rows_weight_multiplies_its_loss(tmp_path, tokenizer_folder, loss, merged):
    """The step with weights is the sum of single rows' steps times their weights, over all items; rows of
    weight 0 are counted and not computed."""
    label = {"apo_zero_unpaired": lambda i: i % 3 > 0, "nll": lambda i: True}.get(loss)
    rows = rows_with_weights(label)
    config = config_for(
        tmp_path,
        tokenizer_folder,
        rows,
        {"loss_type": loss},
        data={"merge_prompts": merged and loss != "nll"},
    )
    rules = StepRules(config.bound_objective.item, 512)
    groups = skip_weightless(unweighed(config), config.bound_objective)
    assert isinstance(groups, TrimmedDataset | SelectedDataset)
    got = gradient(groups, range(len(groups)), config, rules=rules)
    alone = [{key: value for key, value in row.items() if key != "weight"} for row in rows]
    (tmp_path / "alone").mkdir()
    plain = config_for(
        tmp_path / "alone", tokenizer_folder, alone, {"loss_type": loss}, data={"merge_prompts": False}
    )
    single = unweighed(plain)
    items = single.counts.items(rules.item)
    parts = [gradient(single, [index], plain, rules=rules) * items[index] for index in range(8)]
    want = (torch.from_numpy(FACTORS)[:, None] * torch.stack(parts)).sum(0) / items.sum()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    step = plan_step(groups, np.arange(len(groups)), rules, ALONE)
    weightless = items[FACTORS == 0].sum()
    # A completion of weight 0 that shares its prompt with another stays in the row.
    assert step.skipped_items == (1 if merged and loss == "apo_zero_unpaired" else weightless) > 0


@pytest.mark.parametrize("loss", ["dpo", "madpo", "nll", "apo_zero_unpaired"])
def test_rows_are_drawn_and_dropped_by_their_own_weights(tmp_path, tokenizer_folder, loss):
    label = {"apo_zero_unpaired": lambda i: i % 3 > 0, "nll": lambda i: True}.get(loss)
    config = config_for(
        tmp_path,
        tokenizer_folder,
        rows_with_weights(label),
        {"loss_type": loss},
        data={"merge_prompts": False, "sampling": "weight"},
    )
    rules = StepRules(config.bound_objective.item, 512)
    groups = unweighed(config)
    truth = gradient(groups, range(8), config, rules=rules)
    drawn, of_groups = draw_by_weight(groups, config.bound_objective)
    each = torch.stack(
        [
            gradient(drawn, [group], config, rules=rules) if of_groups[group] else torch.zeros(400)
            for group in range(8)
        ]
    )
    chances = torch.from_numpy(of_groups / of_groups.sum())
    torch.testing.assert_close(chances @ each.double(), truth, rtol=1e-10, atol=1e-12)
    light = config.model_copy(update={"data": config.data.model_copy(update={"min_weight": 0.75})})
    data = data_of(light)
    weights = weights_of(groups, config.bound_objective)
    assert weights is not None
    assert sorted(data.train.rows) == [1 + index for index in np.flatnonzero(weights >= 0.75)]
    unit = "pair" if config.bound_objective.item is Item.EDGE else "completion"
    assert data.source.report()["train"][f"{unit}s_below_min_weight"] == (weights < 0.75).sum()


def test_weights_are_reported(tmp_path, tokenizer_folder):
    report = data_of(config_for(tmp_path, tokenizer_folder, rows_with_weights())).source.report()["train"]
    counts = [report[f"rows_{kind}"] for kind in ("with_weight", "of_weight_0", "without_weight")]
    assert counts == [7, 2, 1]
    assert report["weight_mean"] == pytest.approx(sum(x or 0 for x in ROW_WEIGHTS) / 7)


def test_two_ranks_train_on_drawn_groups(tmp_path, tokenizer_folder):
    """The step of two ranks is that of one: loss and gradients."""
    model = save_model(tmp_path / "model", tokenizer_folder, seed=1)
    reference = save_model(tmp_path / "reference", tokenizer_folder, seed=2)
    config = config_for(
        tmp_path,
        tokenizer_folder,
        rows_with(SPREAD, 4),
        model={"model_name_or_path": str(model), "ref_model_name_or_path": str(reference)},
        data={"sampling": "weight"},
        train={"global_batch_size": 4},
    )
    records = [run_ranks(ranks, losses_and_gradients, config, True)[0][0] for ranks in (1, 2)]
    for one, two in zip(*records, strict=True):
        assert one.keys() & LOSSES == two.keys() & LOSSES
        for name in one.keys() & LOSSES:
            assert two[name] == pytest.approx(one[name], rel=1e-5)
