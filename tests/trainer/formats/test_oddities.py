"""What is odd in an example's texts, and what it claims."""

from __future__ import annotations

from typing import Any

import pytest
from text_cases import assistant, preference, user

from madpo.trainer.formats.oddities import (
    CHARACTERS,
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    NO_OBJECT,
    NULL,
    claims_of,
    oddities_of,
)
from madpo.trainer.formats.text_groups import TextGroup, to_group

MARK, REPLACED, CONTROL = CHARACTERS


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"prompt": "tab\t, line\n, return\r, \N{NO-BREAK SPACE}, \N{GRINNING FACE}"}, []),
        ({"prompt": ""}, [EMPTY_PROMPT]),
        ({"prompt": " \n"}, [EMPTY_PROMPT]),
        ({"rejected": " "}, [EMPTY_COMPLETION]),
        ({"chosen": "\ufeffa"}, [MARK]),
        ({"prompt": "a\ufffd"}, [REPLACED]),
        ({"rejected": "a\x07"}, [CONTROL]),
        ({"prompt": "\x85\ufeff"}, [MARK, CONTROL]),
    ],
)
def test_texts(changes, found):
    assert (
        oddities_of(preference(**{"prompt": "a", "chosen": "b", "rejected": "c", **changes}), True) == found
    )


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ([user("a")], []),
        ([user("a"), assistant("b"), user(" ")], [EMPTY_PROMPT]),
        ([{"role": "system", "content": "a"}, user("")], [EMPTY_PROMPT]),
        ([user("a"), {"role": "assistant", "content": "", "reasoning": "\x00"}, user("b")], [CONTROL]),
        ([{"role": "user", "content": [{"type": "text", "text": "\ufeff"}]}], [MARK]),
    ],
)
def test_messages(prompt, found):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    group = preference(prompt=prompt, chosen=[call], rejected=[assistant("c")])
    assert oddities_of(group, True) == found


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"x": [None]}, []),
        ({"x": [{"y": None}]}, [NULL]),
        ('{"x": null}', []),
        ("", []),
        (None, []),
        ("no json", [NO_OBJECT]),
        ('["x"]', [NO_OBJECT]),
        (["x"], [NO_OBJECT]),
        ('{"x": 1, "x": 2}', [NO_OBJECT]),
        ('{"x": NaN}', [NO_OBJECT]),
        ('{"x": 1e999}', [NO_OBJECT]),
    ],
)
def test_arguments_of_calls(arguments, found):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    for prompt, chosen in (([user("a")], [call]), ([user("a"), call, user("b")], [assistant("c")])):
        assert oddities_of(preference(prompt=prompt, chosen=chosen, rejected=[assistant("d")]), True) == found


def test_a_layout_without_a_prompt_lacks_none():
    group = to_group({"text": "a"}, "text")
    assert oddities_of(group, has_prompt=False) == [] and oddities_of(group, True) == [EMPTY_PROMPT]


def pair(chosen: str, rejected: str, prompt: Any = "a") -> int:
    (claim,) = claims_of(preference(prompt=prompt, chosen=chosen, rejected=rejected))
    return claim


def test_the_opposite_claim_differs_in_the_last_bit():
    for one, other in (("b", "c"), ("c", "b"), ("b", " b")):
        assert pair(one, other) ^ 1 == pair(other, one)
    assert pair("b", "c") >> 1 != pair("b", "c", prompt="x") >> 1 != pair("b", "d", prompt="x") >> 1
    good, bad = (
        claims_of(to_group({"prompt": "a", "completion": "b", "label": label}, "unpaired"))
        for label in (True, False)
    )
    assert [claim ^ 1 for claim in good] == bad


def test_a_ranked_group_makes_the_claims_of_its_pairs():
    group = TextGroup("a", ["b", "c", "d"], [(0, 1, 1.0), (0, 2, None), (1, 2, 0.5)])
    assert claims_of(group) == [pair("b", "c"), pair("b", "d"), pair("c", "d")]
