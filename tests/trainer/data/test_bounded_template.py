"""Templates that never end or fill the memory end with one line; those of models write what they wrote."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer
from turn_templates import TEMPLATES

from madpo.trainer.data import bounded_template
from madpo.trainer.data.bounded_template import _TRANSFORMERS, bounded
from madpo.trainer.data.chat_template import render
from madpo.trainer.errors import UserError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a" * 1000}]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


DOUBLED = "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = EXPRESSION %}{% endfor %}"
ENDLESS = {
    "nested": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "over a list": "{% set r = range(90000)|list %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "filtered": "{% for i in range(90000) %}{% for j in range(90000) if j < 0 %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "while reading": "{% for i in range(90000) %}{{ range(90000)|sum }}{% endfor %}",
}
HUGE = {
    "output": "{% for i in range(90000) %}{{ messages[1].content * 90 }}{% endfor %}",
    "text times": "{{ 'a' * 3000000000 }}",
    "list times": "{{ [1] * 3000000000 }}",
    "number times": DOUBLED.replace("'ab'", "7").replace("EXPRESSION", "n.x * n.x"),
    "power": "{{ 10 ** 1000000000 }}",
    "plus": DOUBLED.replace("EXPRESSION", "n.x + n.x"),
    "tilde": DOUBLED.replace("EXPRESSION", "n.x ~ n.x"),
    "format": "{{ '%3000000000d' % 1 }}",
    "format method": "{{ '{:3000000000}'.format(1) }}",
    "format filter": "{{ '%3000000000d'|format(1) }}",
    "center": "{{ 'a'|center(3000000000) }}",
    "zfill": "{{ 'a'.zfill(3000000000) }}",
    "join": "{{ (range(90000)|list)|join(messages[1].content * 1000) }}",
    "join method": "{{ (messages[1].content * 1000).join((messages[1].content * 90)|list) }}",
    "replace": "{{ (messages[1].content * 1000).replace('a', messages[1].content) }}",
    "wordwrap": "{{ ('a ' * 90000)|wordwrap(1, wrapstring=messages[1].content) }}",
    "indent by text": "{{ ('\\n' * 90000)|indent(messages[1].content) }}",
    "urlize": "{{ ('http://a.b ' * 9000)|urlize(rel=messages[1].content) }}",
    "a list in lists": DOUBLED.replace("EXPRESSION", "[n.x, n.x]") + "{{ n.x }}",
    "a tuple in tuples": DOUBLED.replace("EXPRESSION", "(n.x, n.x)") + "{{ n.x|string }}",
    "a table in tables": DOUBLED.replace("EXPRESSION", "{'a': n.x, 'b': n.x}") + "{{ n.x|tojson }}",
    "a table by call": DOUBLED.replace("EXPRESSION", "dict(a=n.x, b=n.x)") + "{{ n.x|pprint }}",
    "lists plus": DOUBLED.replace("'ab'", "[1]").replace("EXPRESSION", "[n.x] + [n.x]") + "{{ n.x }}",
    "batches": DOUBLED.replace("'ab'", "[1]").replace("EXPRESSION", "[1]|batch(99, n.x)|list") + "{{ n.x }}",
    "slices": "{% set x %}{% for i in range(90000) %}{{ messages[1].content[1:] }}{% endfor %}{% endset %}",
    "set block": "{% set x %}{% for i in range(90000) %}{{ 'a' * 90000 }}{% endfor %}{% endset %}",
}


@pytest.mark.parametrize("text", ["{{ ['a', 'b']|random }}", "{{ messages|map('random')|join }}"])
def test_a_template_that_draws_at_random_is_refused(tokenizer, text):
    """Each start would train on other tokens."""
    tokenizer.chat_template = f"{text}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
    with pytest.raises(UserError, match=r"the chat template of .* draws at random, .*; mend it, or take"):
        render(MESSAGES, tokenizer, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ (messages[0].keys() - ['role'])|join }}", "makes a set, whose order is another one at every"),
        ("{{ messages|map(attribute='content') }}", "writes <generator object .* at 0x.*list or "),
        ("{{ 'said ' ~ messages[0].items }}", "writes <built-in method items .* at 0x.*another text at"),
        ("{{ cycler('a') }}", "writes <jinja2.utils.Cycler object at 0x"),
        ("{{ self.said }}{% block said %}{% endblock %}", "writes <.* at 0x"),
    ],
)
def test_a_template_that_writes_another_text_at_each_start_is_refused(tokenizer, text, said):
    tokenizer.chat_template = f"{text}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"
    with pytest.raises(UserError, match=f"the chat template of .* {said}"):
        render(MESSAGES, tokenizer, {})


def test_an_address_in_the_data_is_data(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    said = [*MESSAGES[:1], {"role": "assistant", "content": "<function f at 0x7fae20337c40>"}]
    assert tokenizer.decode(render(said, tokenizer, {})[0]).endswith("at 0x7fae20337c40>")


@pytest.mark.parametrize("name", ENDLESS)
def test_what_would_not_end_is_stopped(tokenizer, monkeypatch, name):
    monkeypatch.setattr(bounded_template, "MOST_SECONDS", 0.05)
    tokenizer.chat_template = ENDLESS[name]
    with pytest.raises(UserError, match=r"^the chat template of '.*' takes more than 0.05 s .*; mend it, or"):
        render(MESSAGES, tokenizer, {})
    monkeypatch.setattr(bounded_template, "MOST_SECONDS", 1e6)  # the next row does not try again
    with pytest.raises(UserError, match=r"takes more than 0.05 s"):
        render(MESSAGES, tokenizer, {})


@pytest.mark.parametrize("name", HUGE)
def test_what_would_fill_the_memory_is_stopped(tokenizer, monkeypatch, name):
    monkeypatch.setattr(bounded_template, "MOST_CHARACTERS", 5_000_000)
    monkeypatch.setattr(bounded_template, "MOST_BYTES", 50_000_000)
    tokenizer.chat_template = HUGE[name]
    with pytest.raises(UserError, match=r"^the chat template of '.*' (makes a value|makes values|formats)"):
        render(MESSAGES, tokenizer, {})


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_templates_of_models_write_is_what_transformers_lets_them_write(name):
    variables = {"messages": MESSAGES, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    written = bounded(TEMPLATES[name]).render(**variables)
    assert written == _TRANSFORMERS(TEMPLATES[name]).render(**variables) != ""
