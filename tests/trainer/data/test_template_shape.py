"""What a conversation says, in every form and at every depth, is looked for in what its template writes."""

from __future__ import annotations

from typing import Any

import pytest
from harness import make_tokenizer
from transformers import AutoTokenizer
from turn_templates import asks, says

from madpo.trainer.data.tokenise import TokenGroup, TokenRules, tokenise
from madpo.trainer.errors import UserError
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.read_row import RowRules, read_row


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("shapes")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def tokens(tokenizer: Any, template: str, answer: dict[str, Any], **more: Any) -> TokenGroup:
    tokenizer.chat_template = template
    row = {"prompt": [asks("on?")], "chosen": [answer], "rejected": [says("bad")], **more}
    return tokenise(read_row(row, ADAPTERS["preference"], RowRules()), tokenizer, TokenRules(2000))


TURNS = """{% for m in messages %}<{{ m.role }}>{{ m.content }}CALLS</>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""
CALLS = {
    "named": "{% for c in m.tool_calls %}{{ c.function.name ~ (c.function.arguments | tojson) }}{% endfor %}",
    "dumped": "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}",
}
RENAMED = "parameters, input or args of tool calls rendered as arguments"


def calling(beside: dict[str, Any] | None = None, **function: Any) -> dict[str, Any]:
    call = {"id": "call_1", "type": "function", "function": {"name": "find", **function}, **(beside or {})}
    return says("", tool_calls=[call])


@pytest.mark.parametrize("key", ["parameters", "input", "args"])
@pytest.mark.parametrize("arguments", [{"q": "film"}, '{"q": "film"}', {}])
def test_arguments_under_another_key_are_rendered(tokenizer, key, arguments):
    want = tokens(tokenizer, TURNS.replace("CALLS", CALLS["named"]), calling(arguments=arguments))
    got = tokens(tokenizer, TURNS.replace("CALLS", CALLS["named"]), calling(**{key: arguments}))
    assert got.completions == want.completions and got.notes[:1] == (RENAMED,)
    dumped = tokens(tokenizer, TURNS.replace("CALLS", CALLS["dumped"]), calling(**{key: {"q": "film"}}))
    assert f'"{key}": {{"q": "film"}}' in tokenizer.decode(dumped.completions[0]) and dumped.notes == ()


@pytest.mark.parametrize(
    "answer",
    [
        calling(arguments={}, explanation="a plot helps"),
        calling({"thought": "a plot helps"}, arguments={}),
        calling({"result": {"plot": "long"}}, arguments={}),
        calling(arguments={}, parameters={"q": "film"}),
    ],
)
def test_what_a_call_says_beside_its_arguments_is_rendered_or_makes_a_bad_row(tokenizer, answer):
    with pytest.raises(UserError, match="leaves out tool_calls of the completion's message 1"):
        tokens(tokenizer, TURNS.replace("CALLS", CALLS["named"]), answer)
    assert tokens(tokenizer, TURNS.replace("CALLS", CALLS["dumped"]), answer).notes == ()


def test_what_names_a_call_need_not_come_out(tokenizer):
    ids = {"index": 0, "call_id": "abc", "toolCallId": "def"}
    assert tokens(tokenizer, TURNS.replace("CALLS", CALLS["named"]), calling(ids, arguments={})).notes == ()
