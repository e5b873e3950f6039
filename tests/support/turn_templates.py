"""Chat templates in the styles of seven families, written for tests of what is scored of a conversation."""

from __future__ import annotations

import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from harness import make_tokenizer
from transformers import AutoTokenizer

from madpo.trainer.data.tokenise import TokenGroup

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QWEN = """{% set ns = namespace(query=-1) %}
{%- for m in messages %}{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}
{%- set ns.query = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought, said = m.reasoning_content or '', m.content or '' %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.query and (loop.last or thought) %}
{{- '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' }}
{%- endif %}
{{- said }}
{%- for c in m.tool_calls %}
{{- '\\n' if said or not loop.first }}
{{- '<tool_call>\\n{"name": "' ~ c.function.name ~ '", "arguments": ' }}
{{- c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
{%- else %}
{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

LLAMA = """{{- bos_token }}{% set lead = [] %}
{%- if messages[0].role == 'system' %}
{%- set lead = messages[:1] %}{% set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' ~ strftime_now('%d %b %Y') ~ '\\n\\n' }}
{{- (lead[0].content | trim if lead else '') ~ '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' ~ f.name ~ '", "parameters": ' }}
{{- (f.arguments | tojson) ~ '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' ~ (m.content | tojson) ~ '<|eot_id|>' }}
{%- else %}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ (m.content | trim) ~ '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

GEMMA = """{{- bos_token }}{% set lead = '' %}
{%- if messages[0].role == 'system' %}
{%- set lead = messages[0].content ~ '\\n\\n' %}{% set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' }}
{{- (lead if loop.first else '') ~ (m.content | trim) ~ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

DEEPSEEK = """{% set ns = namespace(tool=false, system='') %}
{%- for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}
{{- bos_token ~ ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.tool = false %}{{- '<|User|>' ~ m.content }}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '<|Assistant|>' if not ns.tool else '<|outputs_end|>' }}{% set ns.tool = false %}
{{- (m.content or '') ~ '<|calls|>' }}
{%- for c in m.tool_calls %}{{- '<|call|>' ~ c.function.name ~ '\\n' ~ c.function.arguments }}{% endfor %}
{{- '<|calls_end|><|eos|>' }}
{%- elif m.role == 'assistant' %}
{%- set said = m.content.split('</think>')[-1] %}
{{- ('<|outputs_end|>' if ns.tool else '<|Assistant|>') ~ said ~ '<|eos|>' }}{% set ns.tool = false %}
{%- elif m.role == 'tool' %}
{{- '<|output|>' if ns.tool else '<|outputs|><|output|>' }}{% set ns.tool = true %}{{- m.content }}
{%- endif %}
{%- endfor %}
{%- if ns.tool %}{{- '<|outputs_end|>' }}{% endif %}
{%- if add_generation_prompt and not ns.tool %}{{- '<|Assistant|><think>\\n' }}{% endif %}"""

CHANNELS = """{%- for m in messages %}
{%- if m.role != 'assistant' %}{{- '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}
{%- elif m.tool_calls %}
{%- set pending = messages[-1].role == 'tool' %}
{%- if m.thinking and pending %}{{- '<|start|>assistant<|think|>' ~ m.thinking ~ '<|end|>' }}{% endif %}
{%- for c in m.tool_calls %}
{{- '<|start|>assistant to=' ~ c.function.name ~ '<|message|>' }}
{{- (c.function.arguments | tojson) ~ '<|call|>' }}
{%- endfor %}
{%- else %}
{%- if m.thinking and loop.last %}{{- '<|start|>assistant<|think|>' ~ m.thinking ~ '<|end|>' }}{% endif %}
{{- '<|start|>assistant<|message|>' ~ m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""
"""In gpt-oss's style: an answer has channels, and ends otherwise where it is the last. The thinking before a
call goes once an answer follows."""

GENERATING = """{%- for m in messages %}
{%- if m.role == 'tool' %}{{- '<result>' ~ m.content ~ '</result>' }}
{%- else %}
{{- '<|turn>' ~ m.role ~ '\\n' ~ m.content }}
{%- for c in m.tool_calls %}{{- '<call>' ~ (c.function | tojson) ~ '</call>' }}{% endfor %}
{{- '' if m.tool_calls else '<turn|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{- '<|turn>assistant\\n' }}{% endif %}"""
"""In DiffusionGemma's style: no generation prompt behind the result of a tool, and a header all the same."""

TEMPLATES = {"chatml": CHATML, "qwen": QWEN, "llama": LLAMA, "gemma": GEMMA, "deepseek": DEEPSEEK}
TEMPLATES |= {"channels": CHANNELS, "generating": GENERATING}

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>", "<|eos|>", "<|calls|>", "<|call|>"),
    *("<|calls_end|>", "<|outputs|>", "<|output|>", "<|outputs_end|>"),
    *("<|start|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|think|>", "<|turn>", "<turn|>"),
]
"""The special tokens of all of them."""


def tokenizers(folder: Path) -> dict[str, Any]:
    """A tokenizer with each of the templates."""
    make_tokenizer(folder)
    found: dict[str, Any] = {}
    for name, template in TEMPLATES.items():
        found[name] = AutoTokenizer.from_pretrained(folder)
        found[name].add_special_tokens({"additional_special_tokens": SPECIAL})
        found[name].chat_template = template
    return found


def asks(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(tool: str, **arguments: Any) -> dict[str, Any]:
    return says("", tool_calls=[{"type": "function", "function": {"name": tool, "arguments": arguments}}])


def gives(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def scored_text(tokenizer: Any, group: TokenGroup) -> list[str]:
    """The text of every completion, with [ ] around each run of tokens that is scored."""
    texts: list[str] = []
    for completion, mask in zip(group.completions, group.whole_masks, strict=True):
        runs = groupby(zip(completion, mask, strict=True), itemgetter(1))
        parts = [(scored, tokenizer.decode([token for token, _ in run])) for scored, run in runs]
        texts.append("".join(f"[{text}]" if scored else text for scored, text in parts))
    return texts


PARTING = {
    "chosen": [asks("on?"), says("good"), asks("go?"), says("great")],
    "rejected": [asks("on?"), says("bad"), asks("why?"), says("dull"), asks("so?"), says("end")],
}
AGENT = {
    "prompt": [asks("film?")],
    "chosen": [calls("find", q="film", k=3), gives("a plot"), gives("assistant\n"), says("good")],
    "rejected": [calls("find"), gives(""), says("bad")],
}


def conversations(folder: Path) -> Path:
    """Pairs of one, two and three turns, with results of tools, weights and margins."""
    later = [asks("so?"), says("end")]
    rows = [
        {**PARTING, "margin": 2.0},
        {**AGENT, "margin": -1.0},
        {"prompt": [asks("on?")], "chosen": [says("good")], "rejected": [says("bad")], "margin": 0.5},
        {"chosen": PARTING["rejected"], "rejected": [asks("on?"), says("good"), *later], "margin": 3.0},
        {
            "prompt": [asks("a?")],
            "chosen": [says("b", weight=0), *later],
            "rejected": [says("no")],
            "margin": 1.0,
        },
    ]
    path = folder / "turns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
