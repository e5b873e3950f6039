"""Completions with a label in place of pairs, and the completions of other prompts beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import make_config, write_pairs

from madpo.trainer.batches.steps import StepRules, plan_step
from madpo.trainer.config.schema import Config
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.data.training_data import load_data
from madpo.trainer.data.views.mismatched import MismatchedDataset
from madpo.trainer.dist import Shard
from madpo.trainer.formats.text_groups import TextGroup, layout_of, to_group
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.objectives.base import Item

ROWS = [
    {"prompt": f"prompt {i}:", "completion": " good" * (i % 5 + 1), "label": i % 3 > 0} for i in range(12)
]


def config_for(folder: Path, tokenizer: Path, rows: Any, loss_type: str = "kto", **data: Any) -> Config:
    path = folder / "train.jsonl"
    if isinstance(rows, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"model_name_or_path": str(tokenizer)},
        "data": {"dataset_name": str(path), "max_length": 32, **data},
        "objective": {"loss_type": loss_type},
    }
    return make_config(folder, tree)


def groups_of(config: Config, supervised: bool = False) -> Any:
    return load_groups(config.data, "train", load_tokenizer(config.model), supervised)[0]


def test_completions_between_best_and_worst_are_refused_beside_borrowed_ones(tmp_path, tokenizer_folder):
    """Label 0 says that a completion was written for another prompt; one that is neither good nor bad would
    be taken for such a one."""
    rows = [{"prompt": f"p{i}", "completions": [" a", " b", " c"], "scores": [3, 2, 1]} for i in range(4)]
    every = config_for(tmp_path, tokenizer_folder, rows)
    with pytest.raises(ValueError, match=r"neither desirable nor undesirable; set data\.edges=best_worst"):
        load_data(every, load_tokenizer(every.model), training=True)
    config = config_for(tmp_path, tokenizer_folder, rows, edges="best_worst")
    train = load_data(config, load_tokenizer(config.model), training=True).train
    assert train is not None and train[0].labels == [1, -1, 0, 0]


def test_the_format():
    row = {"prompt": "a", "completion": "b", "label": False}
    assert layout_of(row) == "unpaired" and layout_of(row, supervised=True) == "prompt-completion"
    assert layout_of({**row, "chosen": "c", "rejected": "r"}) == "preference"
    for other in ("sports", 1, None):
        assert to_group({**row, "label": other}, "prompt-completion", supervised=True).labels == []
    assert to_group(row, "unpaired") == TextGroup("a", ["b"], [], [-1])
    chat = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    assert to_group({**chat, "label": 1}, "unpaired").labels == [1]


@pytest.mark.parametrize("label", [None, "true", 2, -1, 0.5, []])
def test_a_label_is_true_or_false(label):
    with pytest.raises(ValueError, match="label: true"):
        to_group({"prompt": "a", "completion": "b", "label": label}, "unpaired")


def test_labels_come_with_the_groups(tmp_path, tokenizer_folder):
    groups = groups_of(config_for(tmp_path, tokenizer_folder, ROWS))
    assert [groups[i].labels for i in range(12)] == [[1 if i % 3 else -1] for i in range(12)]
    assert groups.counts.labelled.tolist() == [1] * 12


def test_pairs_are_two_labelled_completions(tmp_path, tokenizer_folder):
    write_pairs(tmp_path / "train.jsonl", 5)
    groups = groups_of(config_for(tmp_path, tokenizer_folder, None))
    assert groups[0].labels == [1, -1]
    assert groups.counts.items(Item.SEQUENCE).tolist() == [2] * 5


def test_imitation_leaves_out_what_is_undesirable(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder, ROWS, "nll")
    groups, read = load_groups(config.data, "train", load_tokenizer(config.model), supervised=True)
    report = read()
    assert len(groups) == 8
    assert report["dropped"] == {"labelled undesirable, and this objective imitates": 4}


def test_other_objectives_say_what_they_need(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder, ROWS, "dpo")
    with pytest.raises(ValueError, match="compares completions"):
        load_data(config, load_tokenizer(config.model), training=True)


def test_labelled_rows_can_be_imitated(tmp_path, tokenizer_folder):
    """All but the undesirable ones."""
    config = config_for(tmp_path, tokenizer_folder, ROWS, "nll")
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None and len(groups) == sum(bool(row["label"]) for row in ROWS)


def test_labels_are_needed(tmp_path, tokenizer_folder):
    rows = [{k: v for k, v in row.items() if k != "label"} for row in ROWS]
    config = config_for(tmp_path, tokenizer_folder, rows)
    with pytest.raises(ValueError, match="kto needs labels; give columns prompt, completion and label"):
        load_data(config, load_tokenizer(config.model), training=True)
    config = config_for(tmp_path, tokenizer_folder, [rows[0], *ROWS[1:3]])
    with pytest.raises(
        ValueError, match=r": 1 of 3 rows have no label, the first is row 1, and objective kto"
    ):
        load_data(config, load_tokenizer(config.model), training=True)


def test_every_completion_serves_another_prompt_once(tmp_path, tokenizer_folder):
    groups = groups_of(config_for(tmp_path, tokenizer_folder, ROWS))
    both = MismatchedDataset(groups, seed=4, max_length=32)
    lent = []
    for index in range(12):
        group, own = both[index], groups[index]
        assert group.prompt == own.prompt and group.completions[0] == own.completions[0]
        assert group.labels == [*own.labels, 0]
        assert both.counts.lengths[index] == len(group.prompt) + sum(map(len, group.completions))
        assert both.counts.completion_tokens[index] == sum(map(len, group.completions))
        lent.append(int(both._partner[index]))
        assert group.completions[1] == groups[lent[-1]].completions[0]
    assert sorted(lent) == list(range(12)) and all(a != b for a, b in enumerate(lent))
    assert both.counts.sequences.tolist() == [2] * 12 and both.counts.labelled.tolist() == [1] * 12
    again = MismatchedDataset(groups, seed=4, max_length=32)
    assert (again._partner == both._partner).all()
    assert (MismatchedDataset(groups, seed=5, max_length=32)._partner != both._partner).any()


def test_pairs_borrow_both_completions_cut_one_by_one(tmp_path, tokenizer_folder):
    write_pairs(tmp_path / "train.jsonl", 20)
    groups = groups_of(config_for(tmp_path, tokenizer_folder, None))
    both = MismatchedDataset(groups, seed=4, max_length=int(groups.counts.lengths.max()) // 2)
    kept = [len(c) for i in range(20) for c in groups[i].completions]
    assert groups.completion_lengths.tolist() == kept
    for index in range(20):
        group = both[index]
        assert both.counts.lengths[index] == len(group.prompt) + sum(map(len, group.completions))


def test_a_borrowed_completion_is_cut_where_it_would_be_too_long(tmp_path, tokenizer_folder):
    groups = groups_of(config_for(tmp_path, tokenizer_folder, ROWS))
    longest = int((groups.counts.lengths).max())
    both = MismatchedDataset(groups, seed=4, max_length=longest)
    for index in range(12):
        group = both[index]
        assert len(group.prompt) + len(group.completions[1]) <= longest
        assert both.counts.lengths[index] == len(group.prompt) + sum(map(len, group.completions))


def test_one_prompt_is_too_few_to_borrow_from(tmp_path, tokenizer_folder):
    config = config_for(tmp_path, tokenizer_folder, ROWS[1:2])
    with pytest.raises(ValueError, match="one prompt is too few"):
        load_data(config, load_tokenizer(config.model), training=True)


def test_the_step_counts_labelled_completions_only(tmp_path, tokenizer_folder):
    groups = groups_of(config_for(tmp_path, tokenizer_folder, ROWS))
    both = MismatchedDataset(groups, seed=4, max_length=32)
    step = plan_step(both, np.arange(8), StepRules(Item.SEQUENCE, 512), Shard(0, 1))
    assert step.num_sequences == 16
    (batch,) = step.batches
    assert batch.scale == 1 / 8 and (batch.labels != 0).sum() == 8


def test_odpo_refuses_margins_without_a_logarithm(tmp_path, tokenizer_folder):
    write_pairs(tmp_path / "train.jsonl", 20)
    config = config_for(tmp_path, tokenizer_folder, None, "odpo")
    with pytest.raises(ValueError, match=r"of 20 margins are 0 or less, of which odpo takes the logarithm"):
        load_data(config, load_tokenizer(config.model), training=True)


def test_an_order_by_margin_needs_margins(tmp_path, tokenizer_folder):
    rows = [{"prompt": "p", "chosen": " good", "rejected": " bad"}] * 3
    config = config_for(tmp_path, tokenizer_folder, rows, "dpo", order="easy_to_hard")
    with pytest.raises(ValueError, match=r"data\.order: easy_to_hard sorts by margin"):
        load_data(config, load_tokenizer(config.model), training=True)
