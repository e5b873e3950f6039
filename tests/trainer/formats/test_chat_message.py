"""One message: its weight under the names of several libraries, and the keys that nobody looks at."""

from __future__ import annotations

from typing import Any

import pytest

from madpo.trainer.errors import UserError
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.chat_message import WEIGHT, read_message
from madpo.trainer.formats.read_row import RowRules, read_row
from madpo.trainer.formats.text_groups import TextGroup

ASK, ANSWER = {"role": "user", "content": "on?"}, {"role": "assistant", "content": "good"}


@pytest.mark.parametrize("key", ["weight", "train", "training"])
@pytest.mark.parametrize("value, weight", [(0, 0), (1, 1), (0.0, 0), (1.0, 1), (True, 1), (False, 0)])
def test_weights_have_three_names_and_two_values(key, value, weight):
    assert read_message("chosen", {**ANSWER, key: value}) == {**ANSWER, WEIGHT: weight}
    assert read_message("chosen", {**ANSWER, key: None}) == ANSWER


@pytest.mark.parametrize("value", [2, -1, 0.5, "0", "false", [1], float("nan")])
@pytest.mark.parametrize("key", ["weight", "train"])
def test_other_weights_are_refused_with_their_place(key, value):
    with pytest.raises(UserError, match=f"^chosen: {key} of a message is 1 or true .* or 0 or false, got"):
        read_message("chosen", {**ANSWER, key: value})


def test_weights_that_disagree_are_refused():
    assert read_message("chosen", {**ANSWER, "weight": 1, "train": True}) == {**ANSWER, WEIGHT: 1}
    with pytest.raises(UserError, match="weight and train of a message disagree"):
        read_message("chosen", {**ANSWER, "weight": 0, "train": True})


def group(adapter: str, row: dict[str, Any]) -> TextGroup:
    return read_row(row, ADAPTERS[adapter], RowRules())


def test_a_prompt_has_no_weights_so_that_equal_ones_stay_equal():
    weighed = group(
        "preference", {"prompt": [{**ASK, "weight": 0}], "chosen": [ANSWER], "rejected": [ANSWER]}
    )
    assert weighed == group("preference", {"prompt": [ASK], "chosen": [ANSWER], "rejected": [ANSWER]})


def test_weights_of_shared_turns_are_read_too():
    turns = [{"from": "human", "value": "on?"}, {"from": "gpt", "value": "good", "weight": 0}]
    turns += [{"from": "human", "value": "so?"}, {"from": "gpt", "value": "great", "train": True}]
    read = group("sharegpt", {"conversations": turns})
    assert read.completions == [[{**ANSWER, "content": "great", WEIGHT: 1}]]
    with pytest.raises(UserError, match=r"conversations\[1\]: weight of a message"):
        group("sharegpt", {"conversations": [turns[0], {**turns[1], "weight": 3}]})


def test_keys_of_messages_that_hold_text_are_found_unless_templates_use_them():
    used = {"name": "a", "tool_call_id": "b", "id": "c", "reasoning_content": "d", "weight": 1}
    odd = {"citations": ["x"], "mood": "glad", "score": 3, "empty": " ", "none": None, "nothing": []}
    read = group("preference", {"prompt": [ASK], "chosen": [{**ANSWER, **used, **odd}], "rejected": [ANSWER]})
    assert read.unknown_keys == ("citations", "mood", "score")
    read = group(
        "preference", {"prompt": [{**ASK, "mood": "glad"}], "chosen": [ANSWER], "rejected": [ANSWER]}
    )
    assert read.unknown_keys == ("mood",)
