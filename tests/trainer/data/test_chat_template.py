"""What a conversation says comes out of its chat template, or the user hears of it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from harness import make_tokenizer
from transformers import AutoTokenizer

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data.tokenise import TokenRules, encode_prompt, tokenise
from madpo.trainer.errors import UserError
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.read_row import RowRules, read_row

TURN = "{{ '<' ~ m.role ~ '>' ~ %s ~ '</>' }}"
OPEN = "{% if add_generation_prompt %}<assistant>{% endif %}"


def template(turn: str) -> str:
    return "{% for m in messages %}" + turn + "{% endfor %}" + OPEN


TEMPLATES = {
    "plain": template(TURN % "m.content"),
    "cuts thinking": template(TURN % "m.content.split('</think>')[-1]"),
    "cuts earlier thinking": template(
        "{% if loop.last %}"
        + TURN % "m.content"
        + "{% else %}"
        + TURN % "m.content.split('</think>')[-1]"
        + "{% endif %}"
    ),
    "cuts another thinking": template(TURN % "m.content.split('</thought>')[-1]"),
    "cuts what is long": template(TURN % "m.content[:16]"),
    "results as JSON": template(TURN % "(m.content | tojson if m.role == 'tool' else m.content)"),
    "three roles": template(
        "{% if m.role in ['system', 'user', 'assistant'] %}" + TURN % "m.content" + "{% endif %}"
    ),
    "strict": template(
        "{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('who?') }}{% endif %}"
        + TURN % "m.content"
    ),
    "developer too": template(TURN % "m.content"),
    "parts": template("<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}</>"),
    "either": template(
        "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}</>"
    ),
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}"
    + template(
        "<{{ m.role }}>{% if m.content is not none %}{{ m.content }}{% endif %}{% for c in m.tool_calls %}"
        "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}</>"
    ),
    "calls if null": template(
        "<{{ m.role }}>{% if m['content'] is none %}{% for c in m.tool_calls %}{{ c.function.name }}"
        "{{ c.function.arguments }}{% endfor %}{% else %}{{ m.content }}{% endif %}</>"
    ),
    "object": template(
        "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}("
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }};{% endfor %}){% endfor %}</>"
    ),
    "text": template(
        "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ '(' + c.function.arguments + ')' }}{% endfor %}</>"
    ),
    "braces": template(
        "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ '{' }}"
        "{% if c.function.arguments is mapping %}{% for k, v in c.function.arguments.items() %}{{ k }}:"
        "{{ v | tojson }};{% endfor %}{% else %}{{ c.function.arguments }}{% endif %}{{ '}' }})"
        "{% endfor %}</>"
    ),
    "values": template(
        "<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "({{ c.function.arguments.values() | join }}){% endfor %}</>"
    ),
    "names of tools": "{% for t in tools or [] %}[{{ (t.function or t).name }}]{% endfor %}"
    + template(TURN % "m.content"),
    "no parameters": "{% for t in tools or [] %}[{{ t.function.name }}: {{ t.function.description }}]"
    "{% endfor %}" + template(TURN % "m.content"),
    "bare tools": "{% for t in tools or [] %}[{{ t.name }}: {{ t.description }}]{% endfor %}"
    + template(TURN % "m.content"),
    "speakers": template(TURN % "(m.name ~ ': ' if m.name else '') ~ m.content"),
    "trims parts": template("<{{ m.role }}>{% for p in m.content %}{{ p.text | trim }}{% endfor %}</>"),
    "trims": template(TURN % "m.content | trim"),
    "dated": "{{ strftime_now('%d %b %Y') }}" + template(TURN % "m.content"),
    "seconds": "{{ strftime_now('%S.%f') }}" + template(TURN % "m.content"),
    "reasoning": template(
        "<{{ m.role }}>{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}</>"
    ),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("templates")
    make_tokenizer(folder)
    out = {}
    for name, text in TEMPLATES.items():
        out[name] = AutoTokenizer.from_pretrained(folder)
        out[name].chat_template = text
    return out


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ASK = say("user", "two and two")
YES, NO = say("assistant", "is four"), say("assistant", "is five")
FIND = {
    "type": "function",
    "function": {"name": "find", "description": "finds", "parameters": {"type": "object"}},
}


def row(prompt: list[Any], chosen: Any = YES, rejected: Any = NO, **more: Any) -> dict[str, Any]:
    as_list = lambda x: x if isinstance(x, list) else [x]  # noqa: E731
    return {"prompt": prompt, "chosen": as_list(chosen), "rejected": as_list(rejected), **more}


def texts(tokenizer: Any, example: dict[str, Any], **rules: Any) -> tuple[str, list[str], tuple[str, ...]]:
    """The prompt and the completions as the model reads them, and the notes."""
    group = tokenise(
        read_row(example, ADAPTERS["preference"], RowRules()), tokenizer, TokenRules(500, **rules)
    )
    assert not group.problem
    return tokenizer.decode(group.prompt), [tokenizer.decode(x) for x in group.completions], group.notes


THOUGHT = say("assistant", "<think>\nby counting\n</think>\n\nis four")
LOST = {
    "thinking of a completion": (
        "cuts thinking",
        row([ASK], THOUGHT),
        "thinking of the completion's message 1",
    ),
    "thinking between marks that nobody knows": (
        "cuts another thinking",
        row([ASK], say("assistant", "<thought>by counting</thought>is four")),
        "content of the completion's message 1",
    ),
    "the end of a long answer": (
        "cuts what is long",
        row([say("user", "2 and 2")], say("assistant", "is four and no more")),
        "content of the completion's message 1",
    ),
    "the end of a long question": (
        "cuts what is long",
        row([say("user", "two and two and two")]),
        "content of message 1",
    ),
    "a tool call": (
        "plain",
        row([ASK], {"role": "assistant", "content": "", "tool_calls": [call("find", {"x": "y"})]}),
        "tool_calls",
    ),
    "reasoning_content": (
        "plain",
        row([ASK], {**YES, "reasoning_content": "by counting"}),
        "reasoning_content",
    ),
    "a tool's result in a completion": (
        "three roles",
        row([ASK], [{**YES, "content": "I ask"}, say("tool", "result"), YES]),
        r"content of message 3 \(role tool\); .* data.template_may_drop=\[tool\]",
    ),
    "a role of the prompt": (
        "three roles",
        row([say("narrator", "it rains"), ASK]),
        r"content of message 1 \(role narrator\)",
    ),
    "tools": ("plain", row([ASK], tools=[FIND]), r"leaves out tools; .* data.template_may_drop=\[tools\]"),
}


@pytest.mark.parametrize("name, example, said", LOST.values(), ids=LOST)
def test_lost_text_makes_a_bad_row(tokenizers, name, example, said):
    with pytest.raises(UserError, match=said):
        texts(tokenizers[name], example)


@pytest.mark.parametrize("name", ["plain", "reasoning", "tools", "calls if null", "either"])
def test_what_a_template_renders_is_no_fault(tokenizers, name):
    prompt, (chosen, _), notes = texts(
        tokenizers[name], row([say("system", "be short"), ASK], THOUGHT if name != "reasoning" else YES)
    )
    assert "be short" in prompt and "two and two" in prompt and notes == ()
    assert ("by counting" in chosen) == (name != "reasoning") and "is four" in chosen


def test_reasoning_that_is_rendered_is_in_the_completion(tokenizers):
    _, (chosen, _), notes = texts(
        tokenizers["reasoning"], row([ASK], {**YES, "reasoning_content": "by counting"})
    )
    assert chosen == "(by counting)is four</>" and notes == ()


@pytest.mark.parametrize("name", ["three roles", "strict"])
def test_developer_is_the_system_where_the_template_knows_that_word_alone(tokenizers, name):
    prompt, _, notes = texts(tokenizers[name], row([say("developer", "be short"), ASK]))
    assert prompt.startswith("<system>be short</>") and notes == (
        "role developer rendered as system, function as tool",
    )
    prompt, _, notes = texts(tokenizers["developer too"], row([say("developer", "be short"), ASK]))
    assert prompt.startswith("<developer>be short</>") and notes == ()


@pytest.mark.parametrize("arguments", [{"x": "y", "n": 3}, '{"x": "y", "n": 3}', "no json"])
@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("name", ["tools", "calls if null"])
def test_tool_calls_come_out_in_every_form_they_are_given_in(tokenizers, name, content, arguments):
    """A template may look for null beside the calls, and Parquet gives every message every key."""
    calls = {"role": "assistant", "content": content, "tool_calls": [call("find", arguments)], "name": None}
    more = {"tools": [FIND]} if name == "tools" else {}
    prompt, (chosen, _), _ = texts(tokenizers[name], row([ASK], calls, **more))
    assert chosen.startswith("find") and ("y" in chosen or "no json" in chosen)
    assert ("finds" in prompt) == (name == "tools")


@pytest.mark.parametrize(
    ("name", "note"), [("plain", "parts of text rendered as one text"), ("parts", None), ("either", None)]
)
def test_parts_of_text_are_read_under_every_template(tokenizers, name, note):
    part = lambda x: [{"type": "text", "text": x}]  # noqa: E731
    example = row(
        [say("user", part("two and two"))],
        say("assistant", part("is four")),
        say("assistant", part("is five")),
    )
    prompt, completions, notes = texts(tokenizers[name], example)
    assert prompt == "<user>two and two</><assistant>" and completions == ["is four</>", "is five</>"]
    assert notes == ((note,) if note else ())


def test_text_is_a_part_under_a_template_of_parts(tokenizers):
    prompt, completions, notes = texts(tokenizers["parts"], row([ASK]))
    assert prompt == "<user>two and two</><assistant>" and completions[0] == "is four</>"
    assert notes == ("text rendered as a part",)


def test_thinking_of_earlier_answers_may_be_left_out_and_is_counted(tokenizers):
    prompt, (chosen, _), notes = texts(tokenizers["cuts earlier thinking"], row([ASK, THOUGHT, ASK], THOUGHT))
    assert "by counting" not in prompt and "by counting" in chosen
    assert notes == ("thinking of earlier answers left out by the template",)


def test_what_the_user_says_may_be_left_out_is_left_out_and_counted(tokenizers):
    example = row([say("narrator", "it rains"), ASK], tools=[FIND])
    prompt, _, notes = texts(tokenizers["three roles"], example, template_may_drop=("narrator", "tools"))
    assert prompt == "<user>two and two</><assistant>"
    assert notes == (
        "left out of the prompt by the template: content of role narrator",
        "left out of the prompt by the template: tools",
    )


def test_a_prompt_alone_is_held_to_the_same_rule(tokenizers):
    group = read_row(row([say("narrator", "it rains"), ASK]), ADAPTERS["preference"], RowRules())
    with pytest.raises(UserError, match="narrator"):
        encode_prompt(group, tokenizers["three roles"], TokenRules(500))


OPENINGS = {
    "never": ("", "<user>two and two</>", "<assistant>is four</>"),
    "where asked": (OPEN, "<user>two and two</><assistant>", "is four</>"),
    "behind a question": (
        "{% if messages[-1].role != 'assistant' %}<assistant>{% endif %}",
        "<user>two and two</><assistant>",
        "is four</>",
    ),
    "always": ("<assistant>", None, None),
    "always, with roles that alternate": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles alternate') }}{% endif %}{% endfor %}<assistant>",
        None,
        None,
    ),
}


@pytest.mark.parametrize("opening, prompt, answer", OPENINGS.values(), ids=OPENINGS)
def test_what_opens_an_answer_is_no_part_of_the_one_before(tokenizers, opening, prompt, answer):
    """A model that is to open its answers by itself learns to."""
    tokenizer = tokenizers["plain"]
    tokenizer.chat_template = TEMPLATES["plain"].removesuffix(OPEN) + opening
    try:
        if prompt is None:
            with pytest.raises(UserError, match=r"opens another answer behind the last one \(it writes .*a"):
                texts(tokenizer, row([ASK]))
        else:
            assert texts(tokenizer, row([ASK]))[:2] == (prompt, [answer, answer.replace("four", "five")])
    finally:
        tokenizer.chat_template = TEMPLATES["plain"]


def test_another_template_of_one_tokenizer_is_looked_at_anew(tokenizers):
    tokenizer, example = tokenizers["plain"], row([ASK], THOUGHT)
    assert "by counting" in texts(tokenizer, example)[1][0]
    tokenizer.chat_template = TEMPLATES["cuts thinking"]
    try:
        with pytest.raises(UserError, match="thinking of the completion"):
            texts(tokenizer, example)
    finally:
        tokenizer.chat_template = TEMPLATES["plain"]


def test_a_text_that_is_the_marker_itself_is_data(tokenizers):
    _, (chosen, _), notes = texts(
        tokenizers["plain"], row([say("user", "madpo_text")], say("assistant", "madpo_text {x}"))
    )
    assert chosen == "madpo_text {x}</>" and notes == ()


AS_OBJECT = "arguments of tool calls, a JSON text, rendered as an object"
AS_TEXT = "arguments of tool calls, an object, rendered as its JSON text"


@pytest.mark.parametrize("arguments", [{"x": "y", "n": None}, '{"x":"y","n":null}'])
@pytest.mark.parametrize(
    ("name", "wants", "rendered"),
    [
        ("object", dict, 'find(x="y";n=null;)</>'),
        ("text", str, None),
        ("braces", dict, 'find({x:"y";n:null;})</>'),
        ("tools", dict, 'find({"x": "y", "n": null})</>'),
    ],
)
def test_arguments_come_out_in_the_form_that_the_template_renders(
    tokenizers, name, wants, rendered, arguments
):
    calls = {"role": "assistant", "content": "", "tool_calls": [call("find", arguments)]}
    _, (chosen, _), notes = texts(tokenizers[name], row([ASK], calls))
    as_text = arguments if isinstance(arguments, str) else '{"x": "y", "n": null}'
    assert chosen == (rendered or f"find({as_text})</>")
    fits = isinstance(arguments, wants)
    assert notes == (() if fits else (AS_OBJECT if wants is dict else AS_TEXT,))


@pytest.mark.parametrize("arguments", [{}, "{}", "", None])
def test_no_arguments_are_an_empty_object_in_every_form(tokenizers, arguments):
    calls = {"role": "assistant", "content": "", "tool_calls": [call("find", arguments)]}
    for name, want in (
        ("object", "find()</>"),
        ("text", "find({})</>"),
        ("braces", "find({})</>"),
        ("tools", "find({})</>"),
    ):
        _, (chosen, _), _ = texts(tokenizers[name], row([ASK], calls))
        if arguments != "" or name != "text":  # which is this text, as it is
            assert chosen == want, name


def test_names_of_arguments_that_do_not_come_out_are_lost(tokenizers):
    calls = {"role": "assistant", "content": "", "tool_calls": [call("go", {"from": "a", "to": "b"})]}
    with pytest.raises(UserError, match="leaves out tool_calls of the completion's message 1"):
        texts(tokenizers["values"], row([ASK], calls))


def test_what_a_template_raises_is_one_line(tokenizers):
    calls = {"role": "assistant", "content": "", "tool_calls": [call("find", "no json")]}
    with pytest.raises(UserError, match="the chat template refuses the conversation: 'str object' has no"):
        texts(tokenizers["object"], row([ASK], calls))


def test_bare_calls_and_tools_are_put_where_the_template_looks_for_them(tokenizers):
    calls = {"role": "assistant", "content": "", "tool_calls": [call("find", {"x": "y"})["function"]]}
    _, (chosen, _), notes = texts(tokenizers["object"], row([ASK], calls))
    assert chosen == 'find(x="y";)</>' and notes == ("bare tool calls rendered under the key function",)
    prompt, _, notes = texts(
        tokenizers["no parameters"], row([ASK], tools=[tool(description="finds")["function"]])
    )
    assert prompt.startswith("[find: finds]")
    assert notes == ("bare tools rendered under the key function",)
    prompt, _, notes = texts(tokenizers["bare tools"], row([ASK], tools=[tool(description="finds")]))
    assert prompt.startswith("[find: finds]")
    assert notes == ("tools under the key function rendered bare",)


def tool(**more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "find", **more}}


TOOLS = {
    "description": tool(description="finds"),
    "parameters": tool(parameters={"type": "object", "properties": {"q": {"type": "string"}}}),
}


@pytest.mark.parametrize("part", TOOLS)
@pytest.mark.parametrize("bare", [True, False])
def test_each_part_of_a_tool_is_looked_for(tokenizers, part, bare):
    given = TOOLS[part]["function"] if bare else TOOLS[part]
    tokenizer = tokenizers["names of tools"]
    with pytest.raises(UserError, match=rf"leaves out the {part} of tools; .*template_may_drop=\[{part}\]"):
        texts(tokenizer, row([ASK], tools=[given]))
    _, _, notes = texts(tokenizer, row([ASK], tools=[given]), template_may_drop=(part,))
    assert notes == (f"left out of the prompt by the template: the {part} of tools",)
    assert texts(tokenizers["tools"], row([ASK], tools=[given]))[2] == ()
    assert texts(tokenizer, row([ASK], tools=[tool()]))[2] == ()


@pytest.mark.parametrize("given", [{"type": "web_search"}, {"type": "file_search", "stores": ["vs1"]}])
def test_a_tool_without_a_name_is_looked_for_by_what_it_says(tokenizers, given):
    """As tools that a provider runs itself; a template that writes names alone says nothing of them."""
    with pytest.raises(UserError, match=r"leaves out tools; .*template_may_drop=\[tools\]"):
        texts(tokenizers["names of tools"], row([ASK], tools=[given]))
    prompt, _, notes = texts(tokenizers["tools"], row([ASK], tools=[given]))
    assert given["type"] in prompt and notes == ()


def test_descriptions_of_parameters_are_parameters(tokenizers):
    of_query = {"type": "string", "description": "what to look for"}
    given = tool(description="finds", parameters={"type": "object", "properties": {"q": of_query}})
    with pytest.raises(UserError, match="leaves out the parameters of tools"):
        texts(tokenizers["no parameters"], row([ASK], tools=[given]))


def test_nulls_in_the_schema_of_a_tool_are_kept(tokenizers):
    of_query = {"type": "string", "default": None, "enum": ["a", None]}
    given = tool(parameters={"type": "object", "properties": {"q": of_query}})
    prompt, _, _ = texts(tokenizers["tools"], row([ASK], tools=[given]))
    assert '"default": null, "enum": ["a", null]' in prompt


def test_the_name_of_a_speaker_that_is_left_out_is_counted_and_of_a_tool_is_not(tokenizers):
    example = row([say("user", "two", name="Ann"), YES, say("user", "and two", name="Bob")], NO, YES)
    prompt, _, notes = texts(tokenizers["speakers"], example)
    assert "Ann: two" in prompt and "Bob: and two" in prompt and notes == ()
    assert texts(tokenizers["plain"], example)[2] == (
        "name of a speaker left out by the template: role user",
    )
    result = [YES, say("tool", "a plot", name="find"), YES]
    assert texts(tokenizers["plain"], row([ASK], result))[2] == ()


def test_what_is_left_out_of_a_message_whose_speaker_is_left_out_too_is_seen(tokenizers):
    long = say("user", "two and two and two", name="Ann")
    with pytest.raises(UserError, match="content of message 1"):
        texts(tokenizers["cuts what is long"], row([long]))


@pytest.mark.parametrize("content", ["  return x", "pass\n", "\n\nx", "x\t", "<think>a</think>x \n"])
def test_blanks_at_the_ends_of_messages_that_the_template_trims_are_counted(tokenizers, content):
    example = row([ASK], say("assistant", content))
    _, (chosen, _), notes = texts(tokenizers["trims"], example)
    assert chosen == f"{content.strip()}</>"
    assert notes == ("blanks at the ends of messages left out by the template",)
    _, (chosen, _), notes = texts(tokenizers["plain"], example)
    assert chosen == f"{content}</>" and notes == ()


def test_blanks_between_parts_that_are_trimmed_one_by_one_stay(tokenizers):
    parts = [{"type": "text", "text": text} for text in ("two ", " and two")]
    prompt, _, notes = texts(tokenizers["trims parts"], row([say("user", parts)]))
    assert prompt == "<user>two  and two</><assistant>"
    assert notes == ("parts of text rendered as one text", "text rendered as a part")


@pytest.mark.parametrize(("name", "now"), [("dated", "31 Dec 2027"), ("seconds", "00.000000")])
def test_a_template_that_writes_the_time_gets_that_of_the_config(tokenizers, name, now):
    """As prompt and answers are rendered one after the other, the time may differ between them otherwise."""
    for _ in range(2):
        prompt, completions, notes = texts(tokenizers[name], row([ASK]), template_date="2027-12-31")
        assert prompt == f"{now}<user>two and two</><assistant>" and completions[0] == "is four</>"
        assert notes == ("the template writes the date, that of data.template_date",)


def test_others_who_render_the_template_get_the_present_date(tokenizers):
    texts(tokenizers["dated"], row([ASK]), template_date="1999-12-31")
    before = datetime.now()
    day = tokenizers["dated"].apply_chat_template([ASK], tokenize=False)[:11]
    assert day in {moment.strftime("%d %b %Y") for moment in (before, datetime.now())}


def test_a_date_is_one_in_the_config():
    assert DataConfig(dataset_name="x", template_date="2026-02-28T10:30").template_date
    with pytest.raises(ValueError, match=r"expected a date, as 2026-01-31, got '2026-02-30'"):
        DataConfig(dataset_name="x", template_date="2026-02-30")


def test_thinking_that_a_prompt_begins_an_answer_with_cannot_be_continued_where_it_moves(tokenizers):
    example = row([ASK, say("assistant", "<think>so</think>is")], say("assistant", " four"))
    assert texts(tokenizers["plain"], example)[1][0] == " four</>"
    with pytest.raises(UserError, match="does not write them as they are, got '<think>so</think>is'"):
        texts(tokenizers["cuts thinking"], example)


def test_a_result_of_a_tool_may_be_written_as_json(tokenizers):
    """As Llama 3.1 has it; what stands in it is there, escaped."""
    result = say("tool", 'says "größer"\nand more')
    _, (chosen, _), notes = texts(tokenizers["results as JSON"], row([ASK], [YES, result, YES]))
    assert "says" in chosen and notes == ()
