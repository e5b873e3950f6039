"""Published layouts of rows become text groups."""

from __future__ import annotations

import pytest
from text_cases import assistant, preference, user

from madpo.trainer.formats.text_groups import TextGroup, layout_of, to_group


def test_the_prompt_may_be_implicit_in_conversations():
    shared = [user("film?"), assistant("which?"), user("this")]
    group = preference(chosen=[*shared, assistant("good")], rejected=[*shared, assistant("bad")])
    assert group.prompt == shared
    assert group.completions == [[assistant("good")], [assistant("bad")]]


def test_a_prompt_repeated_in_chosen_and_rejected_is_taken_off():
    """UltraFeedback's layout, with a text prompt column turned into messages by the user."""
    prompt = [user("film?")]
    group = preference(prompt=prompt, chosen=[*prompt, assistant("good")], rejected=[*prompt, assistant("x")])
    assert group.completions[0] == [assistant("good")]


def test_null_keys_of_parquet_messages_and_a_system_message_change_nothing():
    prompt = [user("film?")]
    chosen = [{"role": "system", "content": "be kind"}, {**user("film?"), "name": None}, assistant("good")]
    rejected = [*chosen[:2], assistant("bad")]
    group = preference(prompt=prompt, chosen=chosen, rejected=rejected)
    assert group.prompt == [{"role": "system", "content": "be kind"}, user("film?")]
    assert group.completions == [[assistant("good")], [assistant("bad")]]


def test_a_completion_may_go_over_several_turns_but_a_conversation_has_two_messages():
    turns = [assistant("b"), user("c"), assistant("d")]
    group = preference(prompt=[user("a")], chosen=turns, rejected=[assistant("e")])
    assert group.completions == [turns, [assistant("e")]]
    with pytest.raises(ValueError, match="at least two messages"):
        to_group({"messages": [assistant("a")]}, "messages")


def test_supervised_training_on_pairs_uses_the_chosen_completion():
    row = {"prompt": "a:", "chosen": " good", "rejected": " bad", "margin": 1.0}
    assert to_group(row, layout_of(row, supervised=True), supervised=True) == TextGroup("a:", [" good"], [])
    assert layout_of({"chosen", "rejected", "messages"}, supervised=True) == "messages"
    assert layout_of({"chosen", "rejected", "messages"}) == "preference"


def test_ultrafeedback_repeats_the_prompt_as_text_and_has_scores():
    shared = [user("film?")]
    row = {
        "prompt": "film?",
        "chosen": [*shared, assistant("good")],
        "rejected": [*shared, assistant("bad")],
        "score_chosen": 8.5,
        "score_rejected": 6,
    }
    group = to_group(row, "preference")
    assert group.prompt == shared
    assert group.edges == [(0, 1, 2.5)]
    assert to_group(row | {"margin": 0.0}, "preference").edges == [(0, 1, 0.0)]
    with pytest.raises(ValueError, match="score_chosen: expected a finite number"):
        to_group(row | {"score_chosen": float("nan")}, "preference")


def test_supervised_layouts():
    assert layout_of(["prompt", "completion", "id"]) == "prompt-completion"
    assert to_group({"prompt": "a", "completion": "b"}, "prompt-completion").completions == ["b"]
    messages = [user("q"), assistant("a")]
    assert to_group({"messages": messages}, "messages") == TextGroup(messages[:1], [messages[1:]], [])
    assert to_group({"text": "a b"}, "text") == TextGroup("", ["a b"], [])
    with pytest.raises(ValueError, match=r"\['answer', 'question'\] are no known layout"):
        layout_of(["question", "answer"])


BAD_FIELDS = [
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty"),
    (
        {"prompt": "a", "chosen": 7, "rejected": "b"},
        "chosen: expected text or a list of messages, got 7",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected: is null"),
    ({"chosen": "b", "rejected": "c"}, "prompt is missing"),
    ({"prompt": "a", "chosen": [], "rejected": "c"}, "chosen: expected text or a list"),
    (
        {"prompt": "a", "chosen": [{"role": "user"}], "rejected": "c"},
        "a message needs text under role",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": [user("c")]}, "all be text or all be lists"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"},
        "margin: expected a finite number",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "margin: expected a finite"),
    (
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("inf")},
        "margin: expected a finite",
    ),
]


@pytest.mark.parametrize("row, message", BAD_FIELDS, ids=[message[:30] for _, message in BAD_FIELDS])
def test_bad_rows_name_the_field(row, message):
    with pytest.raises(ValueError, match=message):
        to_group(row, "preference")
