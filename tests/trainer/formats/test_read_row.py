"""No column that holds text is left out without a word."""

from __future__ import annotations

import re
from typing import Any

import pytest

from madpo.trainer.errors import UserError
from madpo.trainer.formats.adapters import ADAPTERS, OTHER_PROMPT
from madpo.trainer.formats.numbers import MARGINS_DIFFER
from madpo.trainer.formats.read_row import RowRules, choose_adapter, read_row
from madpo.trainer.formats.text_groups import TextGroup


def say(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


TEXT = {"prompt": "two and two", "chosen": " is four", "rejected": " is five"}
TALK = {
    "prompt": [say("user", "two and two")],
    "chosen": [say("assistant", "four")],
    "rejected": [say("assistant", "five")],
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "pairs of texts": TEXT,
    "pairs of conversations": TALK,
    "labelled": {"prompt": TALK["prompt"], "completion": TALK["chosen"], "label": True},
    "supervised": {"prompt": TALK["prompt"], "completion": TALK["chosen"]},
    "messages": {"messages": [*TALK["prompt"], *TALK["chosen"]]},
    "plain text": {"text": "two and two is four"},
    "scored": {"prompt": TALK["prompt"], "completions": [TALK["chosen"], TALK["rejected"]], "scores": [1, 0]},
}


def read(row: dict[str, Any], supervised: bool = False, **rules: Any) -> TextGroup:
    row_rules = RowRules(**rules)
    adapter = ADAPTERS[choose_adapter(row, row_rules, supervised)]
    return read_row(row, adapter, row_rules, supervised)


@pytest.mark.parametrize("row", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", ["context", "history", "images"])
def test_a_column_that_belongs_to_the_prompt_is_used_or_refused(row, name):
    value = ["x.png"] if name == "images" else "It rains."
    with pytest.raises(UserError, match=rf"^{name}: .* data.ignore_columns=\[{name}\]"):
        read({**row, name: value})
    assert read({**row, name: value}, ignore=(name,)) == read(row)
    for nothing in ("", " ", None, [], {}):
        assert read({**row, name: nothing}).unused == ()


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "text" not in name])
def test_a_system_column_becomes_the_system_message(layout, name):
    row = LAYOUTS[layout]
    plain, with_it = read(row), read({**row, name: "Be kind."})
    assert with_it.prompt == [say("system", "Be kind."), *plain.prompt]
    assert with_it.completions == plain.completions


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "text" in name])
def test_a_system_column_beside_plain_text_is_refused_with_a_way_out(layout):
    with pytest.raises(UserError, match=r"^system: beside plain text, .* does not use this column"):
        read({**LAYOUTS[layout], "system": "Be kind."})


def test_a_system_message_that_is_there_already_is_not_said_twice_nor_contradicted():
    row = {**TALK, "prompt": [say("system", "Be kind."), *TALK["prompt"]]}
    assert read({**row, "system": "Be kind."}) == read(row)
    with pytest.raises(UserError, match="begins with another system message"):
        read({**row, "system": "Be short."})
    with pytest.raises(UserError, match="system: expected text, got 3"):
        read({**TALK, "system": 3})


def test_tools_beside_plain_text_are_refused():
    with pytest.raises(UserError, match=r"^tools: beside plain text"):
        read({**TEXT, "tools": [{"name": "find"}]})


RANKED = {"prompt": "a", "completions": ["b", "c", "d"], "scores": [1.0, None, 3.0]}


@pytest.mark.parametrize("tool", [{}, "find", {"function": None}, {"function": "find"}, {"function": {}}])
def test_a_tool_that_is_no_schema_is_refused(tool):
    """A template that writes names would write an empty one for it."""
    with pytest.raises(UserError, match=r"tools: expected a list of JSON schemas, got \["):
        read(LAYOUTS["messages"] | {"tools": [tool]})


def test_a_weight_is_the_rows_or_one_for_each_completion():
    assert read({**TEXT, "weight": 0}).weight == 0 and read({**TEXT, "weight": None}).weight is None
    assert read({**TEXT, "weight": 2}, ignore=("weight",)).weight is None
    assert read({**RANKED, "weight": 1.5}).weight == 1.5
    ranked = read({**RANKED, "weight": [0.5, 9, 2]})
    assert ranked.completions == ["b", "d"] and ranked.completion_weights == [0.5, 2.0]


@pytest.mark.parametrize(
    "row, told",
    [
        ({**TEXT, "weight": -0.5}, "from 0 to 1e+12, got -0.5"),
        ({**TEXT, "weight": 1e30}, "got 1e+30, which is too large"),
        ({**TEXT, "weight": "2"}, "expected a finite number, got '2'"),
        ({**TEXT, "weight": True}, "expected a finite number, got True"),
        ({**TEXT, "weight": [1, 2]}, "expected one number"),
        ({**RANKED, "weight": [1, 2]}, "2 numbers for 3 completions"),
        ({**RANKED, "weight": [1, 2, -3]}, "from 0 to"),
    ],
)
def test_what_is_no_weight_is_refused(row, told):
    with pytest.raises(UserError, match=rf"^weight.*{re.escape(told)}"):
        read(row)


def test_other_columns_with_text_are_named_and_of_numbers_those_that_could_be_margins():
    more = {"source": "here", "id": 7, "tags": ["a"], "empty": "", "chosen_rating": 0.5, "nothing": None}
    assert read({**TEXT, **more}).unused == ("source", "tags", "chosen_rating")
    assert read({**TEXT, **more}, ignore=("tags",)).unused == ("source", "chosen_rating")
    assert read({**TEXT, "is_rating": True, "operating": 1, "tokens": 9}).unused == ()


@pytest.mark.parametrize(
    "name",
    [
        "weights",
        "sample_weight",
        "loss-weight",
        "importance",
        "chosenScore",
        "preference_gap",
        "Strength",
        "delta",
    ],
)
def test_numbers_under_other_names_of_a_margin_or_a_weight_are_named(name):
    assert read({**TEXT, name: 0.5}).unused == (name,)


def test_a_margin_beside_a_single_completion_is_named():
    row = LAYOUTS["supervised"]
    assert read({**row, "margin": 1.5, "score_chosen": 2}).unused == ("margin", "score_chosen")
    assert read({**TEXT, "margin": 1.5}, supervised=True).unused == ()  # the better one is trained on


def test_a_score_whose_other_half_is_not_there_is_named():
    assert read({**TEXT, "score_chosen": 3, "score_rejected": None}).unused == ("score_chosen",)
    assert read({**TEXT, "rejected_score": 3, "margin": 1}).unused == ("rejected_score",)
    crossed = read({**TEXT, "score_chosen": 3, "rejected_score": 1})
    assert crossed.edges == [(0, 1, 2.0)] and crossed.unused == ()


@pytest.mark.parametrize(
    ("numbers", "differ"),
    [
        ({"margin": 3, "score_chosen": 1, "score_rejected": 5}, True),
        ({"score_chosen": 3, "score_rejected": 1, "chosen_score": 1, "rejected_score": 3}, True),
        ({"margin": 0.667, "score_chosen": 1, "score_rejected": 1 / 3}, False),
        ({"margin": 1, "score_chosen": float("nan"), "score_rejected": 1}, False),
        ({"margin": 3}, False),
        ({}, False),
    ],
)
def test_margins_that_disagree_are_said(numbers, differ):
    assert read({**TEXT, **numbers}).odd == ((MARGINS_DIFFER,) if differ else ())


def test_a_later_row_with_a_column_that_is_spelled_otherwise_is_refused():
    rules = RowRules()
    adapter = ADAPTERS[choose_adapter(TEXT, rules)]
    with pytest.raises(UserError, match=r"^column 'Margin' is not margin; set data.columns"):
        read_row({**TEXT, "Margin": 3}, adapter, rules)
    assert read_row({**TEXT, "Margin": 3}, adapter, RowRules(ignore=("Margin",))).unused == ()


@pytest.mark.parametrize("name", ["loss", "loss_mask", "trainable", "loss_scale", "train"])
def test_every_name_of_a_messages_weight_is_read(name):
    turns = [say("user", "a"), {**say("assistant", "b"), name: True}, say("user", "c"), say("assistant", "d")]
    assert len(read({"messages": turns}).prompt) == 1
    shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", name: True}]
    group = read({"conversations": [*shared, *shared]}, adapter="sharegpt")
    assert len(group.completions[0]) == 3
    with pytest.raises(UserError, match=rf"^messages: {name} of a message is 1 or true .* got 0.5"):
        read({"messages": [turns[0], {**turns[1], name: 0.5}]})


@pytest.mark.parametrize(
    "name", ["mask", "Weight", " train", "LOSS_MASK", "calculate_loss", "ignore", "trainOn", "masks"]
)
def test_a_key_that_may_be_a_messages_weight_is_refused(name):
    with pytest.raises(UserError, match=rf"^messages: '{name}' of a message is not read; name it weight"):
        read({"messages": [say("user", "a"), {**say("assistant", "b"), name: 0}]})


@pytest.mark.parametrize(
    "more", [{}, {side: {"from": "gpt", "value": side} for side in ("chosen", "rejected")}]
)
def test_a_system_column_beside_another_system_turn_of_sharegpt_is_refused(more):
    answer = [] if more else [{"from": "gpt", "value": "b"}]
    turns = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "a"}, *answer]
    row = {"conversations": turns, **more}
    with pytest.raises(UserError, match=r"^system: the conversation begins with another system message"):
        read({**row, "system": "Be short."}, adapter="sharegpt")
    same = read({**row, "system": "Be kind."}, adapter="sharegpt")
    assert same == read(row, adapter="sharegpt") == read({**row, "system": ""}, adapter="sharegpt")


@pytest.mark.parametrize("name", ["question", "notes"])
def test_a_column_that_repeats_a_text_of_the_example_is_not_lost(name):
    turns = [{"role": "user", "content": "Why?"}]
    talk = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert read({**talk, name: "Why? "}).unused == ()
    with pytest.raises(UserError, match="question: beside conversations"):
        read({**talk, "question": "Why not?"})


def test_the_message_names_the_adapter_that_uses_the_column_also_after_a_renaming():
    row = {"prompt": "Say it.", "chosen": "It.", "rejected": "No.", "system": "Be kind."}
    with pytest.raises(
        UserError, match=r"data.adapter=orca_pairs with data.columns=\{question: prompt\} does; else"
    ):
        read(row)
    group = read(row, adapter="orca_pairs", columns={"question": "prompt"})
    assert group.prompt[0] == {"role": "system", "content": "Be kind."}


def test_no_adapter_is_advised_that_would_not_read_the_other_columns():
    row = {
        "prompt": "q",
        "response_1": "a",
        "response_2": "b",
        "preference_strength": 1,
        "system": "Be kind.",
    }
    with pytest.raises(UserError, match=r"does not use this column; set data.ignore_columns=\[system\]"):
        read(row, adapter="helpsteer2_preference")


def test_an_unknown_role_of_the_one_who_answers_is_named():
    row = {**TALK, **{side: [say("model", side)] for side in ("chosen", "rejected")}}
    with pytest.raises(
        UserError, match="no prompt fits; the one who answers has the role assistant here, not model"
    ):
        read(row)


def test_the_message_names_the_adapter_that_uses_the_column():
    row = {"instruction": "Say it.", "output": "It.", "system": "Be kind."}
    with pytest.raises(UserError, match=r"system: .* data.adapter=instruction_output does; else set"):
        read(row, supervised=True, adapter="alpaca")


@pytest.mark.parametrize(
    "prompt",
    [
        [say("system", "In one word."), say("user", "A fruit?")],
        [say("user", "A fruit?"), say("user", "A red one.")],
        "Name a fruit.",
    ],
)
def test_a_prompt_that_says_more_than_the_conversations_is_refused(prompt):
    talk = {side: [say("user", "A fruit?"), say("assistant", side)] for side in ("chosen", "rejected")}
    with pytest.raises(UserError, match=r"^prompt: says more than the two conversations begin with"):
        read({"prompt": prompt, **talk})
    for same in ([say("user", "A fruit?")], "A fruit? ", "fruit"):
        assert read({"prompt": same, **talk}) == read(talk)


@pytest.mark.parametrize(
    ("prompt", "is_held"),
    [("no", False), ("know", True), ("KNOW", False), ("you know? ", True), ("u know", False), ("了", True)],
)
def test_a_prompt_in_text_is_held_in_whole_words(prompt, is_held):
    asked = say("user", "Do you know? 你好了吗")
    row = {side: [asked, say("assistant", side)] for side in ("chosen", "rejected")}
    if is_held:
        assert len(read({"prompt": prompt, **row}).prompt) == 1
    else:
        with pytest.raises(UserError, match=r"^prompt: says more"):
            read({"prompt": prompt, **row})


def test_a_prompt_says_alike_in_parts_and_with_arguments_in_another_form():
    def turns(content: Any, arguments: Any) -> list[dict[str, Any]]:
        call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
        calling = {"role": "assistant", "tool_calls": [call]}
        return [{"role": "user", "content": content}, calling, say("tool", "found")]

    sides = {side: [*turns("Where?", {"q": 1}), say("assistant", side)] for side in ("chosen", "rejected")}
    parts = [{"type": "text", "text": "Where?"}]
    assert read({"prompt": turns(parts, '{"q": 1}'), **sides}) == read(sides)
    mixed = {**sides, "rejected": [*turns(parts, '{"q":1}'), say("assistant", "rejected")]}
    assert read({"prompt": turns("Where?", {"q": 1}), **mixed}) == read(sides)
    for other in ({"q": True}, {"q": 1.0}, '{"q": 1', '{"q": 2'):
        unlike = {**sides, "rejected": [*turns(parts, other), say("assistant", "rejected")]}
        assert len(read(unlike).prompt) == 1
    with pytest.raises(UserError, match=r"^prompt: says more"):
        read({"prompt": turns(parts, '{"q": 2}'), **sides})


def test_a_key_that_only_the_prompt_that_is_not_read_has_is_named():
    sides = {side: [*TALK["prompt"], *TALK[side]] for side in ("chosen", "rejected")}
    prompt = [{**TALK["prompt"][0], "documents": "a text"}]
    assert read({"prompt": prompt, **sides}).unused == ("documents (of messages of prompt)",)


def test_a_prompt_of_tulu_that_says_something_else_is_told():
    sides = {side: [*TALK["prompt"], *TALK[side]] for side in ("chosen", "rejected")}
    assert read({"prompt": "two and two", **sides}, adapter="tulu_preferences").odd == ()
    assert read({"prompt": "a river", **sides}, adapter="tulu_preferences").odd == (OTHER_PROMPT,)


def test_a_system_prompt_of_a_completion_of_ultrafeedback_is_named():
    completions = [{"response": text, "fine-grained_score": len(text)} for text in ("a", "bc")]
    row = {"instruction": "q", "completions": completions}
    assert read(row, adapter="ultrafeedback").unused == ()
    completions[1]["custom_system_prompt"] = "Be kind."
    named = read(row, adapter="ultrafeedback").unused
    assert named == ("custom_system_prompt (of completions)",)


def test_a_column_whose_name_another_one_gets_is_named():
    row = {**TEXT, "question": "three and one"}
    group = read(row, columns={"prompt": "question"})
    assert group.prompt == "three and one"
    assert group.unused == ("prompt (data.columns reads question in its place)",)
    for same in ("", None, "three and one"):
        assert read({**row, "prompt": same}, columns={"prompt": "question"}).unused == ()
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    assert read(TEXT, columns=swapped).unused == ()


def test_messages_that_differ_in_an_id_begin_alike():
    talk = {
        side: [{**say("user", "A fruit?"), "id": side}, say("assistant", side)]
        for side in ("chosen", "rejected")
    }
    assert len(read(talk).prompt) == 1


@pytest.mark.parametrize(
    ("example", "rules"),
    [
        (
            {"instruction": "a", "input": "b", "context": "c", "output": "d"},
            {"adapter": "instruction_output"},
        ),
        ({"prompt": "a", "question": "b", "response": "c"}, {"adapter": "instruction_output"}),
        ({**TALK, "system": "a", "system_prompt": "b"}, {}),
    ],
)
def test_two_columns_of_which_one_is_read_must_say_alike(example, rules):
    with pytest.raises(UserError, match=r"^(\w+) and (\w+): both hold text, .* \[\2\] or to \[\1\]$"):
        read(example, **rules)
    two = ["context", "system_prompt", *(["question"] if "prompt" in example else [])]
    assert read(example, ignore=tuple(two), **rules)


@pytest.mark.parametrize("layout", ["supervised", "messages", "plain text"])
@pytest.mark.parametrize("name", ["label", "kto_tag"])
def test_a_label_means_the_same_beside_every_single_completion(layout, name):
    row = LAYOUTS[layout]
    for label, want in ((False, [-1]), (0.0, [-1]), (1, [1]), (None, [])):
        group = read({**row, name: label}, supervised=True)
        assert group.labels == want and group.unused == ()
    for wrong in ("false", "0", -1, 2):
        with pytest.raises(UserError, match=rf"^{name}: true .* got {wrong!r}; .*ignore_columns=\[{name}\]"):
            read({**row, name: wrong}, supervised=True)
        assert read({**row, name: wrong}, supervised=True, ignore=(name,)) == read(row, supervised=True)


def test_a_label_of_a_published_format_is_read_and_one_of_several_completions_is_named():
    row = {"instruction": "two and two", "output": "four", "kto_tag": False}
    assert read(row, adapter="instruction_output").labels == [-1]
    for layout in ("pairs of texts", "scored"):
        assert read({**LAYOUTS[layout], "label": 0}).unused == ("label",)


@pytest.mark.parametrize("name", ["Prompt", "prompt ", "\ufeffprompt", " PROMPT\n"])
def test_a_column_that_is_almost_one_that_is_used_is_refused(name):
    others = {key: value for key, value in TEXT.items() if key != "prompt"}
    with pytest.raises(UserError, match=r"^column .* is not prompt; set data.columns=.*ignore_columns"):
        read({**others, name: "two and two"})
    assert read({**others, name: "two and two"}, columns={"prompt": name}) == read(TEXT)
    assert read({**TEXT, name: "three"}).unused == (name,)
    row = LAYOUTS["supervised"]
    with pytest.raises(UserError, match=r"^column 'Label' is not label"):
        read({**row, "Label": 0}, supervised=True)
    assert read({**row, "Label": 0}, supervised=True, ignore=("Label",)).labels == []
