"""The report of a data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from text_cases import CHAT, assistant, config_for, user

from madpo.trainer.config.schema import Config
from madpo.trainer.data.report import COUNTS, MOST_PLACES, findings, total_report
from madpo.trainer.data.tokenised_cache import load_groups
from madpo.trainer.formats.oddities import EMPTY_PROMPT


def test_the_report_counts_what_was_cut_and_dropped(tmp_path, tokenizer):
    rows = [
        {"prompt": "a go", "chosen": "od", "rejected": " bad", "margin": 1.0},
        {"prompt": "a:", "chosen": " same", "rejected": " same", "margin": 0.0},
        {"prompt": "film " * 40, "chosen": " a", "rejected": " b", "margin": 2.0},
        {"prompt": "a:", "chosen": " good" * 40, "rejected": " b", "margin": -2.0},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups, read = load_groups(config_for(tmp_path, path, max_length=24).data, "train", tokenizer)
    report = read()
    assert len(groups) == report["groups"] == 2
    assert report["dropped"] == {
        "chosen and rejected are the same tokens": 1,
        "prompt fills max_length": 1,
    }
    assert report["truncated_completions"] == 1
    assert report["groups_with_moved_boundary"] == 1
    assert report["tokens"] == groups.counts.lengths.sum()


ODD = [
    {"prompt": "the film", "chosen": " good", "rejected": " bad", "margin": 1.0},
    {"prompt": "the film", "chosen": " bad", "rejected": " good", "margin": 0.5},
    {"prompt": "the film", "chosen": " good", "rejected": " bad", "margin": 2.0},
    {"prompt": "", "chosen": " a", "rejected": " b", "margin": -1e9},
    {"prompt": "a\x07", "chosen": " same", "rejected": " same", "margin": 0.0},
    {"prompt": "a\x07", "chosen": " a", "rejected": " b", "margin": 0.0},
    {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")], "margin": 1.0},
    {"prompt": 4, "chosen": " a", "rejected": " b", "margin": 1.0},
]


def odd_rows(folder: Path, **data: Any) -> Config:
    path = folder / "odd.jsonl"
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in ODD))
    return config_for(folder, path, on_bad_row="drop", **data)


def test_examples_are_named_by_file_and_line(tmp_path, tokenizer):
    tokenizer.chat_template = CHAT
    _, read = load_groups(odd_rows(tmp_path).data, "train", tokenizer)
    report = read()
    where = {key: [x.removeprefix(f"{tmp_path}/") for x in places] for key, places in report["where"].items()}
    assert {key: report[key] for key in COUNTS if report.get(key)} == {
        "repeated_examples": 1,
        "contradicting_examples": 3,
        "examples_of_the_rarer_kind": 1,
        "margins_far_from_the_rest": 1,
    }
    assert report["odd_texts"] == {EMPTY_PROMPT: 1, "text holds control characters": 1}
    assert {key: [place.split(f"{tmp_path}/")[0] for place in places] for key, places in where.items()} == {
        "repeated_examples": ["odd.jsonl:4 (as "],
        "contradicting_examples": [f"odd.jsonl:{line} (as " for line in (2, 3, 4)],
        "examples_of_the_rarer_kind": ["odd.jsonl:8"],
        "margins_far_from_the_rest": ["odd.jsonl:5"],
        EMPTY_PROMPT: ["odd.jsonl:5"],
        "text holds control characters": ["odd.jsonl:7"],
        "chosen and rejected are the same tokens": ["odd.jsonl:6"],
        "unreadable": ["odd.jsonl:9: prompt: expected text or a list of messages, got 4"],
    }
    assert report["where"]["repeated_examples"][0].endswith("odd.jsonl:2)")
    lines = list(findings(report))
    assert len(lines) == len(report["where"])
    assert all(any(f"(first: {places[0]})" in line for line in lines) for places in report["where"].values())


def test_of_many_places_the_first_ones_are_kept(tmp_path, tokenizer):
    path = tmp_path / "same.jsonl"
    path.write_text('{"prompt": "a:", "chosen": " b", "rejected": " c"}\n' * 50)
    _, read = load_groups(config_for(tmp_path, path).data, "train", tokenizer)
    report = read()
    assert report["repeated_examples"] == 49 and len(report["where"]["repeated_examples"]) == MOST_PLACES
    total = total_report("both", [report, report])
    assert total["repeated_examples"] == 98 and len(total["where"]["repeated_examples"]) == MOST_PLACES


def test_a_report_of_several_parts_names_examples_of_all(tmp_path, tokenizer):
    tokenizer.chat_template = CHAT
    _, read = load_groups(odd_rows(tmp_path).data, "train", tokenizer)
    report = read()
    other = {**report, "where": {"unreadable": ["x:1"]}}
    assert total_report("both", [report, other])["where"]["unreadable"][1:] == ["x:1"]
