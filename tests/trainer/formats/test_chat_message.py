"""One message: its weight under the names of several libraries, and the keys that nobody looks at."""

from __future__ import annotations

import json
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


FIND = {"type": "function", "function": {"name": "find", "arguments": {"q": "film"}}}
AS_TEXT = json.dumps(FIND["function"])


@pytest.mark.parametrize(
    "given",
    [
        {"tool_calls": [FIND]},
        {"tool_calls": FIND},
        {"tool_calls": json.dumps([FIND])},
        {"tool_calls": json.dumps(FIND)},
        {"function_call": FIND["function"]},
        {"function_call": AS_TEXT, "tool_calls": []},
    ],
)
@pytest.mark.parametrize("content", ["let me look", None, [{"type": "text", "text": ""}]])
def test_calls_in_every_form_become_a_list(given, content):
    read = read_message("chosen", {**ANSWER, "content": content, **given})
    said = {} if content is None else {"content": content if isinstance(content, str) else ""}
    assert read == {"role": "assistant", **said, "tool_calls": [FIND]}


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
@pytest.mark.parametrize(
    "calls, said",
    [
        ("find(film)", "expected tool calls, got no JSON, 'find"),
        ('[{"name": "find", "name": "look"}]', "key 'name' stands twice"),
        ([AS_TEXT], "a tool call has a function with a name, got"),
        (["abc"], "a tool call has a function with a name, got"),
        ({"arguments": {}}, "a tool call has a function with a name, got"),
        (7, "a tool call has a function with a name, got 7"),
    ],
)
def test_what_is_no_call_is_refused_with_its_key(key, calls, said):
    with pytest.raises(UserError, match=f"^prompt: {key}: {said}"):
        read_message("prompt", {**ANSWER, key: calls})


def test_calls_of_others_and_calls_under_two_keys_are_refused():
    with pytest.raises(UserError, match=r"only the assistant calls tools, got .* of role user"):
        read_message("prompt", {**ASK, "tool_calls": [FIND]})
    assert read_message("prompt", {**ASK, "tool_calls": []}) == {**ASK, "tool_calls": []}
    with pytest.raises(UserError, match="tool_calls and function_call of a message both hold calls"):
        read_message("prompt", {**ANSWER, "tool_calls": [FIND], "function_call": FIND["function"]})


@pytest.mark.parametrize("key", ["thinking", "reasoning_content", "reasoning"])
@pytest.mark.parametrize("value", [["first"], {"summary": "first"}, 42, True])
def test_thinking_is_text(key, value):
    with pytest.raises(UserError, match=f"^chosen: {key} of a message is text, got"):
        read_message("chosen", {**ANSWER, key: value})


@pytest.mark.parametrize("texts, said", [([""], ""), ([" ", ""], " "), (["", "x"], None)])
def test_parts_that_are_all_blank_are_one_text(texts, said):
    parts = [{"type": "text", "text": text} for text in texts]
    assert read_message("prompt", {**ASK, "content": parts})["content"] == (parts if said is None else said)


def test_other_keys_of_parts_are_found():
    part = {"type": "text", "text": "on?", "citations": ["x"], "logprobs": [], "index": 0}
    row = {"prompt": [{**ASK, "content": [part]}], "chosen": [ANSWER], "rejected": [ANSWER]}
    assert group("preference", row).unused == ("citations (of parts of text)",)
