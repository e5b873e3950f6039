"""Published formats, each on a row of its exact shape, and what every row may have beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from published_rows import BAD, GOOD, ULTRAFEEDBACK, answer, user

from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.read_row import RowRules, choose_adapter, choose_edges, read_row
from madpo.trainer.formats.text_groups import LAYOUTS, TextGroup, best_only, layout_of, ranked

DOCS = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def read(name: str, row: dict[str, Any], supervised: bool = False, **rules: Any) -> TextGroup:
    rules_of_row = RowRules(name, **rules)
    return read_row(row, ADAPTERS[choose_adapter(row, rules_of_row, supervised)], rules_of_row, supervised)


@pytest.mark.parametrize("name, row, group", GOOD, ids=[f"{i}-{x[0]}" for i, x in enumerate(GOOD)])
def test_a_row_in_the_published_format_becomes_this_group(name, row, group):
    kept = json.dumps(row)
    assert read(name, row) == group
    assert json.dumps(row) == kept, "reading is pure"


def test_every_published_format_has_a_row_here_and_a_bad_one():
    published = {name for name, adapter in ADAPTERS.items() if adapter.source}
    assert {name for name, _, _ in GOOD} == published
    assert {name for name, _, _ in BAD} == published


@pytest.mark.parametrize("name, changes, message", BAD, ids=[f"{x[0]}-{x[2]}" for x in BAD])
def test_bad_rows_name_the_field(name, changes, message):
    good = next(row for adapter, row, _ in GOOD if adapter == name)
    with pytest.raises(ValueError, match=message):
        read(name, good | changes)


@pytest.mark.parametrize("name, row, group", GOOD, ids=[f"{i}-{x[0]}" for i, x in enumerate(GOOD)])
def test_supervised_training_takes_the_best_completion(name, row, group):
    best = read(name, row, supervised=True)
    assert len(best.completions) == 1 and best.edges == []
    rejected = {loser for _, loser, _ in group.edges}
    assert best.completions[0] == next(x for i, x in enumerate(group.completions) if i not in rejected)


def test_a_margin_beside_one_pair_comes_before_the_sources_own():
    """So what `madpo annotate` writes is read by the adapter of the source."""
    for name, row, group in GOOD:
        if len(group.edges) == 1:
            annotated = read(name, row | {"score_chosen": 3.0, "score_rejected": 3.5, "margin": -0.5})
            assert annotated.edges == [(*group.edges[0][:2], -0.5)], name


def test_the_documented_table_is_the_registry():
    rows = []
    for adapter in ADAPTERS.values():
        columns = ", ".join(" or ".join(f"`{name}`" for name in names) for names in adapter.needs)
        if adapter.source:
            rows.append(f"| `{adapter.name}` | {adapter.source} | {columns} | {adapter.makes} |")
    section = DOCS.read_text().split("## Published formats")[1].split("\n## ")[0]
    assert re.findall(r"^\| `.*$", section, re.M) == rows


def test_auto_finds_what_it_always_found():
    """By the first layout whose columns are there, `scored` last."""
    every = {column for _, needed in LAYOUTS for column in needed}
    assert layout_of(every) == "preference" and layout_of(every, supervised=True) == "prompt-completion"
    assert layout_of(every - {"chosen", "prompt"}) == "messages"
    assert layout_of({"prompt", "completions", "scores", "text"}) == "text"
    for supervised in (False, True):
        assert layout_of({"prompt", "completions", "scores"}, supervised) == "scored"
    for name, needed in LAYOUTS:
        assert choose_adapter(needed, RowRules()) == name
        assert choose_adapter(needed, RowRules(name)) == name


NEAREST = [
    ({"prompt", "answers", "turns"}, "data.adapter=nectar reads these"),
    ({"instruction", "output"}, "data.adapter=alpaca or instruction_output reads these"),
    ({"prompt", "response_0", "response_1"}, "nearest is pku_safe_rlhf, which lacks better_response_id"),
    ({"question", "chosen", "bad"}, "nearest is orca_pairs, which lacks rejected: rename yours"),
    ({"a", "b"}, "rename yours with data.columns, ours first, as in data.columns={prompt: question,"),
]


@pytest.mark.parametrize("columns, message", NEAREST, ids=[x[1][:30] for x in NEAREST])
def test_columns_of_no_layout_name_the_nearest_adapter(columns, message):
    with pytest.raises(
        ValueError, match=re.escape(f"columns {sorted(columns)} are no known layout")
    ) as error:
        choose_adapter(columns, RowRules())
    assert message in str(error.value)


def test_columns_are_renamed_before_anything_else():
    row = {"question": "q", "good": " a", "bad": " b", "prompt": "not this one", "gap": 2}
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "margin": "gap"}
    assert read("auto", row, columns=columns) == TextGroup("q", [" a", " b"], [(0, 1, 2.0)])
    row = {"ask": "q", "output": "a"}
    group = read("instruction_output", row, columns={"question": "ask"})
    assert group == TextGroup([user("q")], [answer("a")], [])


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    rules = RowRules(columns={"prompt": "question"})
    with pytest.raises(ValueError, match=r"columns: prompt: question: no such column; there are \['x'\]"):
        choose_adapter(["x"], rules)
    with pytest.raises(ValueError, match=r"nectar needs the column answers; there are \['prompt'\]"):
        choose_adapter(["prompt"], RowRules("nectar"))
    with pytest.raises(ValueError, match="orca_pairs needs the column question or input, rejected"):
        choose_adapter(["chosen"], RowRules("orca_pairs"))


def test_which_edges():
    """Scores 3 > 2 = 2 > 1: levels of one, two and one completions."""
    group = ranked("p", ["a", "b", "c", "d"], [2.0, 3.0, 1.0, 2.0])
    every = [(0, 2, 1.0), (1, 0, 1.0), (1, 2, 2.0), (1, 3, 1.0), (3, 2, 1.0)]
    assert choose_edges(group, "all") == group and group.edges == every
    adjacent = choose_edges(group, "adjacent")
    assert adjacent.edges == [edge for edge in every if edge != (1, 2, 2.0)]
    assert adjacent.completions == ["a", "b", "c", "d"]
    best_worst = choose_edges(group, "best_worst")
    assert best_worst == TextGroup("p", ["b", "c"], [(0, 1, 2.0)]), "and who is left renumbered"
    assert best_only(group).completions == ["b"]


def test_ties_at_the_ends_and_groups_of_ties():
    group = ranked("p", ["a", "b", "c"], [1.0, 2.0, 2.0], with_margins=False)
    for which in ("all", "adjacent", "best_worst"):
        assert choose_edges(group, which).edges == [(1, 0, None), (2, 0, None)]
    tied = ranked("p", ["a", "b"], [1.0, 1.0])
    assert tied.edges == choose_edges(tied, "best_worst").edges == []
    assert best_only(tied).completions == ["a"]


def test_a_pair_is_the_same_under_every_choice():
    pair = TextGroup("p", ["a", "b"], [(0, 1, -0.5)])
    assert all(choose_edges(pair, which) == pair for which in ("all", "adjacent", "best_worst"))


SCORED = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2.5]}


def test_scored_rows():
    group = read("auto", SCORED)
    assert group == TextGroup("p", ["a", "b", "c"], [(1, 0, 2.0), (1, 2, 0.5), (2, 0, 1.5)])
    chat = {"prompt": [user("p")], "completions": [answer("a"), answer("b")], "scores": [0, -1]}
    assert read("auto", chat) == TextGroup([user("p")], [answer("a"), answer("b")], [(0, 1, 1.0)])
    # As `madpo generate` writes them: a model that ended at once, and a judge that did not answer.
    sampled = {"prompt": "p", "completions": ["", "b", "c"], "scores": [1.0, None, 3.0]}
    assert read("auto", sampled) == TextGroup("p", ["", "c"], [(1, 0, 2.0)])


def test_a_group_without_scores_is_known_as_one_of_comparisons():
    unscored = {"completions": ULTRAFEEDBACK["completions"][3:] * 2}
    for group in (
        read("scored", SCORED | {"scores": [None] * 3}),
        read("ultrafeedback", ULTRAFEEDBACK | unscored),
    ):
        assert group.compared and group.completions == group.edges == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scores": [1, 2]}, "scores: 2 numbers for 3 completions"),
        ({"scores": [1, float("nan"), 2]}, r"scores\[1\]: expected a finite number, got nan"),
        ({"scores": [1e308, -1e308, 2]}, r"scores\[0\]: .* got 1e\+308, which is too large"),
        ({"scores": "123"}, "scores: expected a list of at least 2, got '123'"),
        ({"completions": ["a", 1, "c"]}, r"completions\[1\]: expected text"),
        ({"completions": ["a"]}, "completions: expected a list of at least 2"),
        ({"completions": ["a", answer("b"), "c"]}, "all be text or all be lists"),
        ({"prompt": None}, "prompt: is null"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_scored_rows_name_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        read("scored", SCORED | changes)
