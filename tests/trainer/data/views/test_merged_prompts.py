"""Rows of one prompt as one group: the same losses and gradients, fewer tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_config, run_ranks, save_model, sentence
from plain import zero3_steps

from madpo.trainer.batches.steps import StepRules, plan_step
from madpo.trainer.config.schema import Config
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.data.training_data import load_data
from madpo.trainer.data.training_source import DatasetSource
from madpo.trainer.data.views.merged_prompts import MergedDataset, joined, merge_prompts
from madpo.trainer.dist import Shard
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import Item

PROMPTS = 6


def pairs(seed: int = 0) -> list[dict[str, Any]]:
    """Three rows a prompt, one prompt after another three times over: the first two share the chosen
    completion, the third says the opposite of the second."""
    random, rows = np.random.default_rng(seed), [[], [], []]
    for index in range(PROMPTS):
        prompt, a, b, c = f"{index} {sentence(random)}:", *(f" {x} {sentence(random)}" for x in "abc")
        sides = ((a, b), (a, c), (c, a))
        for part, (chosen, rejected) in zip(rows, sides, strict=True):
            margin = round(float(random.normal(1.0, 2.0)), 3)
            part.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin})
    return [row for part in rows for row in part]


def ranked(seed: int = 0) -> list[dict[str, Any]]:
    """Two rows a prompt with a completion in common."""
    random, rows = np.random.default_rng(seed), []
    for index in range(PROMPTS):
        prompt, common = f"{index} {sentence(random)}:", f" {sentence(random)}"
        for _ in range(2):
            texts = [common, f" x {sentence(random)}", f" y {sentence(random)}"]
            rows.append({"prompt": prompt, "completions": texts, "scores": random.permutation(3).tolist()})
    return rows


def labelled(seed: int = 0) -> list[dict[str, Any]]:
    """Three rows a prompt, of which two are the same."""
    random, rows = np.random.default_rng(seed), []
    for index in range(PROMPTS):
        prompt, texts = f"{index} {sentence(random)}:", [f" {sentence(random)}", f" x {sentence(random)}"]
        good = bool(index % 2)
        rows += [
            {"prompt": prompt, "completion": texts[which], "label": good == (which == 0)}
            for which in (0, 1, 0)
        ]
    return rows


def config_for(folder: Path, tokenizer: Path, rows: list[Any], objective: Any = None, **tree: Any) -> Config:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_name": str(path), "merge_prompts": True, **tree.pop("data", {})}
    model = {"model_name_or_path": str(tokenizer)}
    return make_config(
        folder, {"model": model, "objective": objective or {"loss_type": "madpo"}, "data": data, **tree}
    )


def train_of(config: Config) -> Any:
    return load_data(config, load_tokenizer(config.model), training=True).train


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "pairs": (pairs, {"loss_type": "madpo", "tau": 2.0}),
    "pairs of a batch": (pairs, {"loss_type": "dr_dpo"}),
    "ranked": (ranked, {"loss_type": "dpo"}),
    "ranked, per token": (ranked, {"loss_type": "simpo"}),
    "labelled": (labelled, {"loss_type": "kto"}),
    "pairs as labels": (pairs, {"loss_type": "apo_zero_unpaired"}),
}


@pytest.mark.ranks
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_merged_rows_is_the_step_on_the_rows(tmp_path, tokenizer_folder, case):
    """All rows in one step, on two ranks with ZeRO-3: the loss and every gradient."""
    rows, objective = CASES[case]
    model = save_model(tmp_path / "model", tokenizer_folder, seed=1)
    reference = save_model(tmp_path / "reference", tokenizer_folder, seed=2)
    found = []
    for merge in (False, True):
        config = config_for(
            tmp_path,
            tokenizer_folder,
            rows(),
            objective,
            data={"merge_prompts": merge, "max_length": 96},
            train={"global_batch_size": len(rows()), "micro_batch_tokens": 256},
        )
        paths = {"model_name_or_path": str(model)}
        if config.bound_objective.needs_reference:
            paths["ref_model_name_or_path"] = str(reference)
        tree = config.model_dump(mode="json", by_alias=True) | {"model": paths}
        config = Config.model_validate(tree)
        groups = train_of(config)
        assert isinstance(groups, MergedDataset) == merge
        size = {"train": config.train.model_copy(update={"global_batch_size": len(groups)})}
        found.append(run_ranks(2, zero3_steps, config.model_copy(update=size), 1)[0][0])
    (loss, gradients), (merged_loss, merged_gradients) = found
    assert merged_loss == pytest.approx(loss, rel=1e-6)
    assert gradients.keys() == merged_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.linalg.vector_norm(gradient) > 0, name
        torch.testing.assert_close(merged_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_prompt_and_common_completions_stand_once_and_every_comparison_stays(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder, pairs(), data={"max_length": 96})
    plain = train_of(
        config.model_copy(update={"data": config.data.model_copy(update={"merge_prompts": False})})
    )
    loaded = load_data(config, load_tokenizer(config.model), training=True)
    groups: Any = loaded.train
    assert len(plain) == 18 and len(groups) == PROMPTS
    for index in range(PROMPTS):
        group, parts = groups[index], [plain[index + PROMPTS * k] for k in range(3)]
        assert group.prompt == parts[0].prompt and len(group.completions) == 3
        assert group.labels == [1, -1, 0]  # a: twice better, once worse; c: once each way
        told = [
            (group.completions[winner], group.completions[loser], margin)
            for winner, loser, margin in group.edges
        ]
        assert told == [(p.completions[0], p.completions[1], p.edges[0][2]) for p in parts]
    report = loaded.report["train"]
    assert (report["rows"], report["groups"], report["rows_merged"]) == (18, PROMPTS, 12)
    assert report["tokens"] == plain.counts.lengths.sum() - report["tokens_saved_by_merging"]
    assert groups.rows.tolist() == plain.rows[:PROMPTS].tolist()
    assert groups.ease("easy_to_hard") == pytest.approx(plain.margins.reshape(3, PROMPTS).mean(0))


@pytest.mark.parametrize(
    "rows, loss_type",
    [(pairs, "dpo"), (pairs, "kto"), (ranked, "dpo"), (ranked, "apo_zero_unpaired"), (labelled, "kto")],
)
def test_the_counts_are_those_of_the_groups(tmp_path, tokenizer_folder, rows, loss_type):
    config = config_for(tmp_path, tokenizer_folder, rows(), {"loss_type": loss_type}, data={"max_length": 96})
    groups = train_of(config)
    assert isinstance(groups, MergedDataset)
    every = [groups[index] for index in range(len(groups))]
    assert groups.counts.lengths.tolist() == [len(g.prompt) + sum(map(len, g.completions)) for g in every]
    assert groups.counts.completion_tokens.tolist() == [sum(map(len, g.completions)) for g in every]
    assert groups.counts.sequences.tolist() == [len(g.completions) for g in every]
    assert (
        groups.counts.edges.tolist() == groups.counts.counted_edges.tolist() == [len(g.edges) for g in every]
    )
    assert groups.counts.labelled.tolist() == [sum(label != 0 for label in g.labels) for g in every]
    margins = [edge[2] for g in every for edge in g.edges]
    np.testing.assert_array_equal(groups.margins, np.array(margins, dtype=float))


def test_labels_that_occur_twice_count_twice(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder, labelled(), {"loss_type": "apo_zero_unpaired"})
    group = train_of(config)[1]
    assert group.labels == [1, -1, 1] and group.completions[0] == group.completions[2]


def test_a_group_ends_where_it_would_be_larger_than_a_pair_may_be(tmp_path, tokenizer_folder):
    rows = [{"prompt": "the:", "chosen": f" {'a ' * n}", "rejected": f" {'b ' * n}"} for n in range(4, 16)]
    config = config_for(tmp_path, tokenizer_folder, rows, {"loss_type": "dpo"}, data={"max_length": 24})
    groups = train_of(config)
    assert 1 < len(groups) < len(rows) and groups.counts.lengths.max() <= 48
    assert groups.counts.edges.sum() == len(rows) and (np.diff(groups.rows) > 0).all()
    prompt = len(groups[0].prompt)
    for index in range(len(groups) - 1):  # the next row would have exceeded it
        following = groups[index + 1]
        more = sum(map(len, following.completions[:2]))
        assert groups.counts.lengths[index] + more > 48 and len(following.prompt) == prompt


def test_rows_that_fill_the_limit_to_the_token_make_one_group(tmp_path, tokenizer_folder):
    rows = [{"prompt": "the:", "chosen": f" {'a ' * n}", "rejected": f" {'b ' * n}"} for n in (3, 5, 4)]
    data = {"max_length": 24, "merge_prompts": False}
    config = config_for(tmp_path, tokenizer_folder, rows, {"loss_type": "dpo"}, data=data)
    groups, entry = train_of(config), config.bound_objective
    together = [len(groups[0].prompt) + groups.counts.completion_tokens[:n].sum() for n in (1, 2, 3)]
    for most, want in ((together[2], [3]), (together[2] - 1, [2, 1]), (together[1], [2, 1]), (1, [1, 1, 1])):
        assert merge_prompts(groups, entry, int(most)).counts.edges.tolist() == want
    # A completion that the group has already takes no more room.
    again = [*rows[:2], {**rows[1], "rejected": rows[0]["chosen"]}]
    groups = train_of(config_for(tmp_path, tokenizer_folder, again, {"loss_type": "dpo"}, data=data))
    assert merge_prompts(groups, entry, int(together[1])).counts.edges.tolist() == [3]
    assert merge_prompts(groups, entry, int(together[1]) - 1).counts.edges.tolist() == [1, 2]


def test_rows_that_a_mixture_repeats_stay_repeated(tmp_path, tokenizer_folder):
    """Repeated rows are to be seen again, in another step; a line that stands twice in the file is not."""
    rows = pairs()[: 2 * PROMPTS]
    config = config_for(tmp_path, tokenizer_folder, [*rows, rows[0]], data={"max_length": 96})
    once, parts = train_of(config), [{"path": config.data.dataset_name, "fraction": 2.5}]
    mixture = {"dataset_name": None, "datasets": parts, "max_length": 96}
    groups = train_of(config_for(tmp_path, tokenizer_folder, [*rows, rows[0]], data=mixture))
    assert len(once) == PROMPTS and once[0].edges[0] == once[0].edges[2]
    assert [groups[i] for i in range(PROMPTS)] == [once[i] for i in range(PROMPTS)]
    assert [groups[i] for i in range(PROMPTS, 2 * PROMPTS)] == [once[i] for i in range(PROMPTS)]
    assert groups.counts.edges.sum() == 2 * 13 + round(0.5 * 13)


def test_supervised_rows_and_prompts_that_stand_once_are_left_alone(tmp_path, tokenizer_folder):
    supervised = config_for(tmp_path, tokenizer_folder, pairs(), {"loss_type": "nll"})
    assert not isinstance(train_of(supervised), MergedDataset)
    config = config_for(tmp_path, tokenizer_folder, pairs()[:PROMPTS])
    groups = train_of(config)
    assert not isinstance(groups, MergedDataset) and "merged" not in groups.fingerprint


def test_the_runs_identity_depends_on_what_is_merged_and_not_on_the_micro_batch(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder, pairs())
    tokenizer = load_tokenizer(config.model)

    def content(**changes: Any) -> str:
        sections = {name: getattr(config, name).model_copy(update=x) for name, x in changes.items()}
        source = load_data(config.model_copy(update=sections), tokenizer, training=True).source
        assert source is not None
        return source.content

    assert content(train={"micro_batch_tokens": 9999}) == content() != content(data={"merge_prompts": False})


def test_a_step_is_the_same_wherever_training_goes_on_and_for_any_number_of_ranks(tmp_path, tokenizer_folder):
    groups = train_of(config_for(tmp_path, tokenizer_folder, pairs()))
    source = DatasetSource(groups, 3, "shuffled", dict)
    whole = source.take(0, 12)[1].tolist()
    again = DatasetSource(train_of(config_for(tmp_path, tokenizer_folder, pairs())), 3, "shuffled", dict)
    assert [again.take(at, 1)[1][0] for at in range(12)] == whole
    rules, indices = StepRules(Item.EDGE, 256), np.array(whole[:4])
    told = [
        Counter(
            tuple(batch.margins.tolist())
            for rank in range(ranks)
            for batch in plan_step(groups, indices, rules, Shard(rank, ranks)).batches
        )
        for ranks in (1, 2)
    ]
    assert sorted(x for part in told[0] for x in part) == sorted(x for part in told[1] for x in part)


def test_parts_of_one_row_alone_are_not_touched():
    twice = TokenGroup([1], [[2], [2], [3]], [(0, 2, None), (1, 2, None)], [1, 1, -1])
    assert joined([twice], share_completions=True) == twice
    both = joined([twice, TokenGroup([1], [[3], [2]], [(0, 1, 0.5)])], share_completions=True)
    assert both.completions == twice.completions
    assert both.edges == [(0, 2, None), (1, 2, None), (2, 0, 0.5)] and both.labels == [0, 1, -1]
