"""Views of groups whose completions have masks: what they count is what their groups hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from turn_templates import conversations, scored_text, tokenizers

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.groups import TokenDataset, with_logps
from madpo.trainer.data.lengths import shapes_of
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.data.views.merged_prompts import merge_prompts
from madpo.trainer.data.views.mismatched import MismatchedDataset
from madpo.trainer.data.views.trimmed import SelectedDataset, TrimmedDataset
from madpo.trainer.objectives.build import build


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    return tokenizers(tmp_path_factory.mktemp("tokenizer"))["chatml"]


@pytest.fixture(scope="module")
def groups(tmp_path_factory, tokenizer) -> GroupDataset:
    folder = tmp_path_factory.mktemp("turns")
    return read(conversations(folder), tokenizer)


def read(path: Path, tokenizer: Any) -> GroupDataset:
    data = DataConfig(dataset_name=str(path), cache_dir=str(path.with_name("cache")), max_length=500)
    return load_groups(data, "train", tokenizer)[0]


def check(view: TokenDataset) -> None:
    """The view's counts are those of its groups, and it gives each the log-probs of its own tokens."""
    held = [view[index] for index in range(len(view))]
    assert any(group.masks for group in held)
    for group in held:
        assert [len(mask) for mask in group.whole_masks] == list(map(len, group.completions))
    assert view.counts.scored_tokens.tolist() == [sum(group.scored) for group in held]
    completion_tokens = [sum(map(len, group.completions)) for group in held]
    assert view.counts.completion_tokens.tolist() == completion_tokens
    assert view.counts.lengths.tolist() == shapes_of(held).tokens().tolist()
    reference = with_logps(view, np.zeros(view.counts.scored_tokens.sum(), np.float32)).reference
    assert reference is not None
    assert [len(reference[i]) for i in range(len(view))] == [sum(group.scored) for group in held]


def test_what_is_in_the_table_is_what_was_tokenised(groups, tokenizer):
    check(groups)
    assert groups[0].masks and not groups[2].masks  # single answers need none
    assert scored_text(tokenizer, groups[2]) == ["[good<|im_end|>\n]", "[bad<|im_end|>\n]"]


@pytest.mark.parametrize("loss_type, completions", [("dpo", 5), ("kto", 6)])
def test_rows_of_one_prompt_share_completions_that_are_scored_alike(groups, loss_type, completions):
    """Three rows ask `on?`; good, bad and the three turns after bad are in two of them each."""
    view = merge_prompts(groups, build(loss_type), most_tokens=10_000)
    check(view)
    check(SelectedDataset(view, np.array([0]), np.array([True])))
    assert len(view[0].completions) == completions


def test_a_trimmed_group_keeps_the_masks_of_its_completions(groups):
    view = merge_prompts(groups, build("dpo"), most_tokens=10_000)
    check(TrimmedDataset(view, np.arange(5) != 1, np.arange(len(view)), view.counts.edges))


@pytest.mark.parametrize("max_length", [500, 60, 45])
def test_borrowed_completions_bring_their_masks_cut_or_whole(groups, max_length):
    check(MismatchedDataset(groups, seed=0, max_length=max_length))


def test_completions_of_equal_tokens_and_other_masks_stay_apart(tmp_path, tokenizer):
    path = conversations(tmp_path)
    first = path.read_text().splitlines()[0]
    other = first.replace('"content": "good"}', '"content": "good", "weight": 0}')
    path.write_text(f"{first}\n{other}\n")
    view = merge_prompts(read(path, tokenizer), build("dpo"), most_tokens=10_000)
    check(view)
    assert view[0].completions[0] == view[0].completions[2] and len(view[0].completions) == 3
