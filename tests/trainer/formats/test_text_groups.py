"""Text groups from rows at their edges: which layout, which prompt, which numbers."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import pytest

from madpo.trainer.formats.chat_message import without_padding
from madpo.trainer.formats.numbers import finite, label_of, margin_of
from madpo.trainer.formats.text_groups import (
    TextGroup,
    best_only,
    layout_of,
    objects,
    ranked,
    same_kind,
    to_group,
    with_edges,
)


def talk(*texts: str) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    return [
        {"role": "user" if number % 2 == 0 else "assistant", "content": text}
        for number, text in enumerate(texts)
    ]


@pytest.mark.parametrize("longer", ["chosen", "rejected"])
def test_a_conversation_that_goes_on_where_the_other_ends_leaves_no_side_empty(longer):
    """One side is the beginning of the other: the prompt ends one message earlier."""
    short = talk("a?", "b")
    shorter = "rejected" if longer == "chosen" else "chosen"
    for long in (talk("a?", "b", "c?", "d"), [*short, {"role": "assistant", "content": "and c"}]):
        group = to_group({longer: long, shorter: short}, "preference")
        want = {longer: long[1:], shorter: short[1:]}
        assert group.prompt == talk("a?")
        assert group.completions == [want["chosen"], want["rejected"]]


def test_equal_conversations_keep_their_last_message_as_completion():
    group = to_group({"chosen": talk("a?", "b"), "rejected": talk("a?", "b")}, "preference")
    assert (group.prompt, group.completions) == (talk("a?"), [talk("a?", "b")[1:]] * 2)


def test_conversations_that_share_nothing_need_a_prompt():
    with pytest.raises(ValueError, match="do not start with the same message"):
        to_group({"chosen": talk("a?", "b"), "rejected": talk("x?", "b")}, "preference")
    with pytest.raises(ValueError, match="do not start with the same message"):
        to_group({"chosen": talk("a?", "b")[1:], "rejected": talk("a?", "c")[1:]}, "preference")
    group = to_group(
        {"prompt": talk("a?"), "chosen": talk("", "b")[1:], "rejected": talk("", "c")[1:]}, "preference"
    )
    assert group.prompt == talk("a?") and group.completions == [talk("", "b")[1:], talk("", "c")[1:]]


@pytest.mark.parametrize(
    ("columns", "supervised", "plain"),
    [
        ("prompt chosen rejected", "preference", "preference"),
        ("chosen rejected text", "text", "preference"),
        ("prompt completion label", "prompt-completion", "unpaired"),
        ("prompt completion", "prompt-completion", "prompt-completion"),
        ("prompt completion messages", "prompt-completion", "prompt-completion"),
        ("messages text", "messages", "messages"),
        ("prompt completions scores", "scored", "scored"),
        ("prompt completions scores chosen rejected", "scored", "preference"),
    ],
)
def test_the_layout_by_the_columns(columns, supervised, plain):
    assert layout_of(columns.split()) == plain
    assert layout_of(columns.split(), supervised=True) == supervised


def test_labels_are_true_or_false_in_either_spelling():
    assert [label_of({"label": x}) for x in (True, 1, 1.0, False, 0)] == [1, 1, 1, -1, -1]
    for wrong in (2, -1, "true", 0.5, []):
        with pytest.raises(ValueError, match=rf"^label: true .* got {re.escape(repr(wrong))}$"):
            label_of({"label": wrong})
        with pytest.raises(ValueError, match=r"^label: true .* data.ignore_columns=\[label\]"):
            label_of({"label": wrong}, is_needed=False)
    with pytest.raises(ValueError, match=r"^label: true .*got None$"):
        label_of({"label": None})
    assert label_of({"label": None, "kto_tag": False}) == label_of({"label": 0, "kto_tag": False}) == -1
    with pytest.raises(ValueError, match="label and kto_tag disagree"):
        label_of({"label": True, "kto_tag": False})


def test_margins_come_from_the_first_columns_that_hold_some():
    scores = {"score_chosen": 3, "score_rejected": 1, "chosen_score": 10, "rejected_score": 2}
    assert margin_of({**scores, "margin": -0.5}) == -0.5
    assert margin_of({**scores, "margin": 0}) == 0.0
    assert margin_of({**scores, "margin": None}) == 2.0
    assert margin_of({**scores, "score_chosen": None}) == 8.0
    assert margin_of({**scores, "score_rejected": None}) == 8.0
    assert margin_of({"score_chosen": 0, "score_rejected": 0}) == 0.0
    assert margin_of({"score_chosen": 3, "rejected_score": 1}) == 2.0
    assert margin_of({"score_rejected": 3, "chosen_score": 1}) == -2.0
    assert margin_of({"score_chosen": 3, "chosen_score": 1}) is None


def test_numbers_are_finite_and_no_truth_values():
    assert finite(3, "x") == 3.0 and finite(-1e12, "x") == -1e12 and finite(Decimal("1.5"), "x") == 1.5
    for wrong in (True, "1", None, float("nan"), float("inf"), -float("inf"), Decimal("NaN")):
        with pytest.raises(ValueError, match=r"x: expected a finite number, got [^,]*$"):
            finite(wrong, "x")
    for large in (1e300, -1.1e12, 10**400, Decimal("1e39")):
        with pytest.raises(
            ValueError, match=r"x: expected a finite number, got .*, which is too large: 1e.12 is the most"
        ):
            finite(large, "x")


def test_ranked_completions_are_compared_where_their_scores_differ():
    group = ranked("a", ["x", "y", "z"], [1.0, 3.0, 1.0])
    assert group.edges == [(1, 0, 2.0), (1, 2, 2.0)] and group.compared
    assert ranked("a", ["x", "y"], [0.5, 1.0], with_margins=False).edges == [(1, 0, None)]
    assert ranked("a", ["x", "y"], [1.0, 1.0]).edges == []


def test_scored_rows_leave_out_what_has_no_score():
    row = {"prompt": "", "completions": ["x", "", "z"], "scores": [0.0, None, -2]}
    group = to_group(row, "scored")
    assert (group.prompt, group.completions, group.edges) == ("", ["x", "z"], [(0, 1, 2.0)])
    assert to_group({**row, "scores": [0.0, 1.0, -2]}, "scored", supervised=True).completions == [""]
    with pytest.raises(ValueError, match="scores: 2 numbers for 3 completions"):
        to_group({**row, "scores": [1, 2]}, "scored")
    with pytest.raises(ValueError, match="no completion has a score"):
        to_group({**row, "scores": [None] * 3}, "scored", supervised=True)
    with pytest.raises(ValueError, match=r"scores\[2\]: expected a finite number"):
        to_group({**row, "scores": [1, 2, "3"]}, "scored")
    with pytest.raises(ValueError, match="completions: expected a list of at least 2"):
        to_group({**row, "completions": ["x"], "scores": [1]}, "scored")


def test_the_best_completion_is_the_first_that_nothing_is_better_than():
    edges: list[Any] = [(1, 0, None), (2, 0, None)]
    assert best_only(TextGroup("a", ["x", "y", "z"], edges, [0, 1, 1])) == TextGroup("a", ["y"], [])
    alone = TextGroup("a", ["x"], [], [1])
    assert best_only(alone) is alone


def test_lists_have_their_least_length():
    assert objects({"x": [1]}, "x") == [1] and objects({"x": [1, 2]}, "x", at_least=2) == [1, 2]
    for wrong, least in ((None, 1), ([], 1), ([1], 2), ("ab", 2)):
        with pytest.raises(ValueError, match=f"x: expected a list of at least {least}"):
            objects({"x": wrong}, "x", at_least=least)


def test_some_edges_of_a_group_keep_the_completions_they_compare():
    group = TextGroup("a", ["w", "x", "y", "z"], [(0, 1, 1.0), (3, 1, 2.0), (2, 0, 3.0)], [1, -1, 1, -1])
    left = with_edges(group, group.edges[1:2])
    assert (left.completions, left.edges, left.labels) == (["x", "z"], [(1, 0, 2.0)], [-1, -1])


def test_conversations_of_a_single_message_are_refused_and_of_two_are_not():
    with pytest.raises(ValueError, match="at least two messages"):
        to_group({"messages": talk("a")}, "messages")
    assert to_group({"messages": talk("a", "b")}, "messages").completions == [talk("a", "b")[1:]]
    with pytest.raises(ValueError, match="put conversations in a `messages` column"):
        to_group({"text": talk("a", "b")}, "text")


def test_completions_go_on_where_the_prompt_ends_and_end_with_the_assistant():
    tool, system = {"role": "tool", "content": "x"}, {"role": "system", "content": "x"}
    (answer,) = talk("", "b")[1:]
    calls = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    for right in ([calls, tool, answer], [answer, *talk("c"), answer], [answer, system, answer]):
        assert same_kind(talk("a"), right) == [right]
    assert same_kind(talk("a", "b"), talk("c", "d")) == [talk("c", "d")]
    for prompt, wrong in (
        (talk("a"), [answer, tool]),
        (talk("a"), [system, answer]),
        (talk("a"), [*talk("a"), answer]),
        (talk("a", "b"), talk("a", "b", "c", "d")),
    ):
        with pytest.raises(ValueError, match="it must go on where the prompt ends, and end with the assist"):
            same_kind(prompt, wrong)
    with pytest.raises(ValueError, match="must all be text or all be lists"):
        same_kind("a", [answer])


def test_nulls_are_taken_out_at_any_depth():
    assert without_padding({"a": None, "b": [{"c": None, "d": 0}], "e": ""}) == {"b": [{"d": 0}], "e": ""}


def test_a_tool_call_needs_no_text_and_a_message_of_another_does():
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
    row = {"prompt": talk("a"), "chosen": [calls], "rejected": talk("", "b")[1:]}
    assert to_group(row, "preference").completions[0] == [
        {"role": "assistant", "tool_calls": [{"name": "look"}]}
    ]
    for wrong in ({**calls, "tool_calls": []}, {"role": 1, "content": "x"}):
        with pytest.raises(ValueError, match="chosen: a message needs text under role"):
            to_group({**row, "chosen": [wrong]}, "preference")
