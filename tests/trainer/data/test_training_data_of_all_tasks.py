"""What a row says is trained on or spoken of, in every task: one row for each way to lose something.

All rows stand in one file, which each task reads once; what became of a row is asked of its table and report.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pytest
from harness import make_config, make_tokenizer
from transformers import AutoTokenizer

from madpo.trainer.data.report import Report
from madpo.trainer.data.stream import Stream
from madpo.trainer.data.tokenised_cache import read_table
from madpo.trainer.data.training_data import load_data

TEMPLATE = """{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}
{%- for m in messages %}{% if m.role in ['system', 'user', 'assistant', 'tool'] %}
{{- '<' ~ m.role ~ '>' ~ (m.content or '').split('</think>')[-1] | trim }}
{%- for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '</>' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""

TASKS: dict[str, dict[str, Any]] = {
    "pairs": {"objective": {"loss_type": "dpo"}},
    "supervised": {"objective": {"loss_type": "nll"}},
    "rewards": {"objective": {"loss_type": "bradley_terry"}},
    "kto": {"objective": {"loss_type": "kto"}},
    "stream": {
        "data": {"streaming": True, "stream_block": 7},
        "train": {"max_steps": 1, "global_batch_size": 2},
    },
}


class Read(NamedTuple):
    """What became of the file of all rows."""

    file: Path
    rows: list[dict[str, Any]]  # of the table
    report: Report


class Trained(NamedTuple):
    """A row that is trained on."""

    prompt: Any
    answer: Any
    text: str  # what stands in the tokens of prompt and answer
    says: str = ""  # what is counted of it
    more: dict[str, Any] = {}  # noqa: RUF012


class Refused(NamedTuple):
    """A row that is bad."""

    prompt: Any
    answer: Any
    says: str
    more: dict[str, Any] = {}  # noqa: RUF012


def asks(text: str, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **more}


def calls(arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    return [{"role": "assistant", "content": None, "tool_calls": [call]}]


ASK = [asks("on?")]
GOOD = [asks("good", "assistant")]
FIND = {"type": "function", "function": {"name": "find", "description": "finds films"}}

CASES: dict[str, Trained | Refused] = {
    "arguments in a JSON text": Trained(
        ASK, calls('{"q": "film"}'), '{"q": "film"}}</>', "a JSON text, rendered as an object"
    ),
    "null among arguments": Trained(ASK, calls({"q": None}), '{"q": null}}</>'),
    "the role developer": Trained(
        [asks("be brief", "developer"), *ASK],
        GOOD,
        "<system>be brief</>",
        "role developer rendered as system",
    ),
    "a speaker's name": Trained(
        [asks("on?", name="Ann")], GOOD, "<user>on?</>", "name of a speaker left out"
    ),
    "blanks at the end": Trained(ASK, [asks("good\n", "assistant")], "good</>", "blanks at the ends"),
    "thinking that is cut": Refused(
        ASK, [asks("<think>by plot</think>good", "assistant")], "thinking of the completion's message 1"
    ),
    "an unknown role": Refused([asks("it rains", "narrator"), *ASK], GOOD, "message 1 (role narrator)"),
    "a tool's description": Refused(ASK, GOOD, "leaves out the description of tools", {"tools": [FIND]}),
    "a column beside messages": Trained(ASK, GOOD, "<system>be kind</>", more={"system": "be kind"}),
    "a column beside text": Refused("on:", " good", "system: beside plain text", {"system": "be kind"}),
    "a column of notes": Trained("on:", " good", "on: good", "notes", {"notes": "not looked at"}),
    "the end of text": Trained("so:", " fine", "so: fine<eos>"),
    "half a character": Refused("on:", " \ud83d", "half a character"),
    "a huge number": Refused("on:", " good", "weight: expected a finite number", {"weight": 1e300}),
    "an empty text": Refused("on:", "", "is empty"),
    "an empty message": Refused(ASK, [asks("", "assistant")], "ends with an empty message"),
}


def row_of(task: str, prompt: Any, answer: Any, more: dict[str, Any], label: bool = True) -> dict[str, Any]:
    if task in ("supervised", "kto"):
        labels = {"label": label} if task == "kto" else {}
        return {"prompt": prompt, "completion": answer, **labels, **more}
    other = " bad" if isinstance(prompt, str) else [asks("bad", "assistant")]
    return {"prompt": prompt, "chosen": answer, "rejected": other, **more}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    made = AutoTokenizer.from_pretrained(folder)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module", params=TASKS)
def read(request, tmp_path_factory, tokenizer) -> Read:
    """One sound row of either label, the CASES, and a line that is cut off."""
    task, folder = request.param, tmp_path_factory.mktemp("rows")
    rows = [row_of(task, "sound:", f" {label}", {}, label) for label in (True, False)]
    rows += [row_of(task, case.prompt, case.answer, case.more) for case in CASES.values()]
    file = folder / "rows.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), '{"prompt": "cut']) + "\n")
    where = {"dataset_name": str(file), "on_bad_row": "drop", "max_length": 120}
    data = {**where, **TASKS[task].get("data", {})}
    config = make_config(folder, {"model": {"model_name_or_path": "unused"}, **TASKS[task], "data": data})
    loaded = load_data(config, tokenizer, training=True)
    if isinstance(loaded.source, Stream):
        tables = [block.examples for block in loaded.source.tables()]
    else:
        tables = [read_table(config.data, "train", tokenizer, config.bound_objective.supervised)[1]]
    return Read(file, datasets.concatenate_datasets(tables).to_list(), loaded.report["train"])


@pytest.mark.parametrize("name", CASES)
def test_what_a_row_says_is_trained_on_or_spoken_of(read, tokenizer, name):
    number = list(CASES).index(name) + 2
    case, row, place = CASES[name], read.rows[number], f"{read.file}:{number + 1}"
    bad = [line for line in read.report["where"]["unreadable"] if line.startswith(f"{place}: ")]
    if isinstance(case, Refused):
        (line,) = bad
        assert case.says in line and "\n" not in line and row["unreadable"]
        return
    assert not bad and not row["problem"]
    assert case.text in tokenizer.decode(row["prompt"] + row["completions"][0])
    said = [*row["notes"], *row["unused"]]
    assert [case.says in text for text in said] == ([True] if case.says else [])
    assert all(place in read.report["where"][text] for text in said)


def test_a_line_that_is_cut_off_and_all_others_are_counted(read):
    assert read.report["where"]["unreadable"][-1].startswith(f"{read.file}:{len(CASES) + 3}: not JSON")
    refused = sum(isinstance(case, Refused) for case in CASES.values())
    assert read.report["dropped"] == {"unreadable": refused + 1}
    assert read.report["rows"] == len(CASES) + 3


@pytest.mark.parametrize("label", [0, 0.0, False])
def test_a_label_of_zero_is_false_for_both_tasks_that_read_labels(tmp_path, tokenizer, label):
    rows = [{"prompt": "on:", "completion": f" {x}", "label": x} for x in (label, 1, True)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {"model": {"model_name_or_path": "unused"}, "data": {"dataset_name": str(file)}}
    data = make_config(tmp_path, tree).data
    assert read_table(data, "train", tokenizer)[1]["labels"][:] == [[-1], [1], [1]]
    problems = read_table(data, "train", tokenizer, supervised=True)[1]["problem"][:]
    assert problems == ["labelled undesirable, and this objective imitates", "", ""]


def test_null_is_padding_in_a_table_and_a_word_in_a_line(tmp_path, tokenizer):
    """Parquet gives every object of a column every key."""
    both = [row_of("pairs", ASK, calls(given), {}) for given in ({"q": "film"}, {"k": 3})]
    datasets.Dataset.from_list(both).to_parquet(str(tmp_path / "rows.parquet"))
    row = row_of("pairs", ASK, calls({"q": "film", "k": None}), {})
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    found = {}
    for file in ("rows.parquet", "rows.jsonl"):
        tree = {
            "model": {"model_name_or_path": "unused"},
            "data": {"dataset_name": str(tmp_path / file), "max_length": 120},
        }
        table = read_table(make_config(tmp_path, tree).data, "train", tokenizer)[1]
        found[file] = [tokenizer.decode(completions[0]) for completions in table["completions"][:]]
    call = '{"name": "find", "arguments": %s}</>'
    assert found["rows.parquet"] == [call % '{"q": "film"}', call % '{"k": 3}']
    assert found["rows.jsonl"] == [call % '{"q": "film", "k": null}']
