"""Keys and variables that a template reads are told from names that merely stand in its text."""

from __future__ import annotations

import pytest
from turn_templates import QWEN

from madpo.trainer.data.template_keys import unread_keys, unread_variables

LOOP = "{% for m in messages %}BODY{% endfor %}"


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.mood }}",
        "{{ m['mood'] }}",
        "{{ m.get('mood', '') }}",
        "{% if 'mood' in m %}sad{% endif %}",
        "{% if m.mood is defined %}sad{% endif %}",
        "{% set said = m %}{{ said.mood }}",
        "{{ messages[loop.index0 - 1].mood }}",
        "{{ (messages | last).mood }}",
        "{{ loop.previtem.mood if loop.previtem }}",
        "{% for x in messages[1:] %}{{ x.mood }}{% endfor %}",
        "{% set ns = namespace(last=none) %}{% set ns.last = m %}{{ ns.last.mood }}",
        "{% macro write(x) %}{{ x.mood }}{% endmacro %}{{ write(m) }}",
        "{% macro write(x) %}{{ x.mood }}{% endmacro %}{{ write(x=m) }}",
        "{{ messages | selectattr('mood', 'equalto', 'sad') | list }}",
        "{{ messages | map(attribute='mood') | join }}",
        "{{ m | tojson }}",
        "{{ m }}",
        "{% for key, value in m.items() %}{{ value }}{% endfor %}",
    ],
)
def test_a_key_that_is_read(body):
    assert unread_keys(LOOP.replace("BODY", body), ("mood",)) == []


@pytest.mark.parametrize(
    "body",
    [
        "{{ m.content }}mood",
        "{{ 'mood' }}",
        "{# mood #}{{ m.moody }}",
        "{% for mood in m.tool_calls %}{{ mood.name }}{% endfor %}",
        "{% for c in m.tool_calls %}{{ c.mood }}{% endfor %}",
        "{% set text = m.content %}{{ text.mood }}",
        "{% if m.content == 'mood' or 'mood' in m.content %}sad{% endif %}",
        "{% macro write(x) %}{{ x.mood }}{% endmacro %}{{ write(m.content) }}",
        "{% for t in tools or [] %}{{ t.mood }}{{ t | tojson }}{% endfor %}",
    ],
)
def test_a_key_that_is_not_read_though_its_name_is_there(body):
    assert unread_keys(LOOP.replace("BODY", body), ("mood",)) == ["mood"]


def test_the_keys_of_a_whole_template():
    keys = ("reasoning_content", "think", "tool_call", "function", "arguments", "thought", "response")
    assert unread_keys(QWEN, keys) == [*keys[1:]]


def test_variables_that_no_template_of_several_reads():
    several = {"default": LOOP, "tool_use": LOOP + "{{ documents }}{% set date = 1 %}{{ date }}"}
    assert unread_variables(several, ("documents", "date", "enable_thinkng")) == ["date", "enable_thinkng"]
    assert unread_variables(QWEN, ("enable_thinking", "add_generation_prompt", "query")) == ["query"]
