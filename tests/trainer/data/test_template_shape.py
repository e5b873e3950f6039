"""What a conversation says, in every form and at every depth, is looked for in what its template writes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from harness import make_tokenizer
from transformers import AutoTokenizer
from turn_templates import asks, says

from madpo.trainer.data.tokenise import TokenGroup, TokenRules, tokenise
from madpo.trainer.errors import UserError
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.json_lines import read_json
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


TYPES = """{% for t in tools or [] %}{{ t.name ~ ': ' ~ t.description }}(
{%- for name, x in (t.parameters.properties or {}).items() %}
{{- name ~ ': ' ~ x.type ~ ' ' ~ x.description }}{% endfor %}){% endfor %}"""
"""The top of the schema alone, as templates in the style of TypeScript write it."""


def with_tool(tokenizer: Any, head: str, parameters: Any, **rules: Any) -> TokenGroup:
    tool = {"name": "find", "description": "finds", "parameters": parameters}
    return tokens(tokenizer, head + TURNS.replace("CALLS", ""), says("good"), tools=[tool], **rules)


def schema(**of_query: Any) -> dict[str, Any]:
    query = {"type": "string", "description": "what to look for", **of_query}
    return {"type": "object", "properties": {"q": query}, "required": ["q"]}


DUMPED = "{{ tools | tojson if tools else '' }}"
DEEP = {
    "choices": schema(enum=["plot", "cast"]),
    "a nested name": schema(properties={"deep": {"type": "string"}}),
    "a nested description": schema(items={"type": "string", "description": "one of them"}),
    "one of several": schema(anyOf=[{"type": "string"}, {"type": "string", "description": "a title"}]),
    "a definition": {**schema(), "$defs": {"title": {"type": "string", "description": "a title"}}},
    "by name without a schema": {"q": {"type": "str", "description": "what to look for"}},
    "a list": [{"name": "q", "description": "what to look for"}],
    "no schema": "q: what to look for",
}


@pytest.mark.parametrize("parameters", DEEP.values(), ids=DEEP)
def test_what_the_schema_of_a_tool_says_is_looked_for_at_every_depth(tokenizer, parameters):
    with pytest.raises(UserError, match=r"leaves out the parameters of tools; .*template_may_drop=\[param"):
        with_tool(tokenizer, TYPES, parameters)
    assert with_tool(tokenizer, DUMPED, parameters).notes == ()


@pytest.mark.parametrize("parameters", [schema(), {"type": "object"}, {}, None, "", "{}"])
def test_a_schema_that_comes_out_is_no_fault(tokenizer, parameters):
    head = tokenizer.decode(with_tool(tokenizer, TYPES, parameters).prompt).split("<user>")[0]
    said = "q: string what to look for" if parameters == schema() else ""
    assert head == f"find: finds({said})"


@pytest.mark.parametrize("key", ["input_schema", "inputSchema"])
def test_a_schema_under_another_key_is_looked_for_too(tokenizer, key):
    tool = {"name": "find", "description": "finds", "parameters": {}, key: schema()}
    with pytest.raises(UserError, match=rf"leaves out the {key} of tools; .*template_may_drop=\[{key}\]"):
        tokens(tokenizer, TYPES + TURNS.replace("CALLS", ""), says("good"), tools=[tool])


def test_a_schema_in_json_text_is_an_object(tokenizer):
    for head in (TYPES, DUMPED):
        want, got = with_tool(tokenizer, head, schema()), with_tool(tokenizer, head, json.dumps(schema()))
        assert got.prompt == want.prompt
        assert got.notes == ("parameters of tools, a JSON text, rendered as an object",)


LONG = "a film in which nothing at all happens for hours"
CUT = {
    "calls": (
        TURNS.replace("CALLS", CALLS["named"].replace("| tojson", "| tojson | truncate(42, true, '', 0)")),
        calling,
    ),
    "thinking": (
        TURNS.replace("{{ m.content }}CALLS", "{{ (m.reasoning or '')[:20] }}{{ m.content }}"),
        lambda arguments: says("good", reasoning=arguments["q"]),
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_what_a_template_cuts_by_length_makes_a_bad_row(tokenizer, name):
    template, answer = CUT[name]
    assert not tokens(tokenizer, template, answer(arguments={"q": "film"})).problem
    part = {"calls": "tool_calls", "thinking": "reasoning"}[name]
    with pytest.raises(UserError, match=f"leaves out {part} of the completion's message 1"):
        tokens(tokenizer, template, answer(arguments={"q": LONG}))


@pytest.mark.parametrize(
    "arguments", [{"q": 'says "größer"\nand', "of": ["it's", {"n": "\t"}]}, "no json", ""]
)
def test_arguments_that_are_escaped_stand_there(tokenizer, arguments):
    dumped = TURNS.replace("CALLS", CALLS["dumped"])
    for given in (arguments, arguments if isinstance(arguments, str) else json.dumps(arguments)):
        assert not tokens(tokenizer, dumped, calling(arguments=given)).problem


RESPELLED = "numbers in %s written otherwise by the template"


@pytest.mark.parametrize(
    ("number", "is_said"),
    [
        ("3.14159265358979323846", True),
        ("1e5", True),
        ("-0", True),
        ("0.10", True),
        ("0.1", False),
        ("7", False),
    ],
)
def test_numbers_that_a_template_writes_otherwise_are_told_of(tokenizer, number, is_said):
    """They are written as JSON writes them, unless the data and the template have them in a text."""
    named = TURNS.replace("CALLS", CALLS["named"])
    as_is = TURNS.replace(
        "CALLS", CALLS["named"].replace("(c.function.arguments | tojson)", "c.function.arguments")
    )
    text = f'{{"x": [{number}]}}'
    of_calls, of_tools = RESPELLED % "arguments of tool calls", RESPELLED % "tools"
    for given in (text, read_json(text)):
        assert (of_calls in tokens(tokenizer, named, calling(arguments=given)).notes) == is_said
    kept = tokens(tokenizer, as_is, calling(arguments=text))
    assert of_calls not in kept.notes and number in tokenizer.decode(kept.completions[0])
    assert (of_calls in tokens(tokenizer, as_is, calling(arguments=read_json(text))).notes) == is_said
    of_tool = json.dumps(schema(minimum="least")).replace('"least"', number)
    for given in (of_tool, read_json(of_tool)):
        assert (of_tools in with_tool(tokenizer, DUMPED, given).notes) == is_said
