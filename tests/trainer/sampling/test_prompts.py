"""Prompts out of every layout, and pairs out of scores."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from madpo.trainer.config.data import DataConfig
from madpo.trainer.data.report import findings
from madpo.trainer.data.tokenise import TokenRules, tokenise
from madpo.trainer.formats.adapters import ADAPTERS
from madpo.trainer.formats.read_row import RowRules, read_row
from madpo.trainer.sampling.pairs import Pair, choose_pair, pair_row, random_of
from madpo.trainer.sampling.prompts import Prompts, read_prompts

ASK = [{"role": "user", "content": "why"}]
ANSWER = [{"role": "assistant", "content": "so"}]
OTHER = [{"role": "assistant", "content": "not so"}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture
def tokenizer(tokenizer_folder) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def read(folder: Path, rows: list[Any], tokenizer: Any, options: Any = None, **data: Any) -> Prompts:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    config = DataConfig(dataset_name=str(path), cache_dir=str(folder / "cache"), **data)
    return read_prompts(config, "train", tokenizer, **(options or {}))


@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "the", "chosen": " a", "rejected": " b"}, "the"),
        ({"chosen": ASK + ANSWER, "rejected": ASK + OTHER}, ASK),
        ({"prompt": "why", "chosen": ASK + ANSWER, "rejected": ASK + OTHER}, ASK),
        ({"prompt": "the", "completion": " a", "label": True}, "the"),
        ({"prompt": ASK, "completion": ANSWER}, ASK),
        ({"messages": ASK + ANSWER}, ASK),
        ({"chosen": ASK + ANSWER + ASK + OTHER, "rejected": ASK + OTHER + ASK + ANSWER}, ASK),
        ({"prompt": "the"}, "the"),
        ({"prompt": "the", "label": "article"}, "the"),  # of answers that are not used
        ({"messages": ASK + ANSWER, "label": "doubt"}, ASK),
        ({"prompt": ASK, "completions": [ANSWER, OTHER], "scores": [1, 2]}, ASK),
    ],
)
def test_every_layout_gives_its_prompt(tmp_path, tokenizer, row, prompt):
    found = read(tmp_path, [row], tokenizer)
    assert found.texts == [prompt]
    assert found.lengths == [len(tokenizer("the")["input_ids"]) if prompt == "the" else 5]


def test_a_prompt_that_is_stored_as_bytes(tmp_path, tokenizer):
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"prompt": [b"the"]}).to_parquet(str(path))
    config = DataConfig(dataset_name=str(path), cache_dir=str(tmp_path / "cache"))
    assert read_prompts(config, "train", tokenizer).texts == ["the"]


def test_a_question_that_the_completion_begins_with_belongs_to_the_prompt(tmp_path, tokenizer):
    again = [{"role": "user", "content": "and", "weight": 0}]
    found = read(tmp_path, [{"prompt": ASK + ANSWER, "completion": again + OTHER}], tokenizer)
    assert found.texts == [[*ASK, *ANSWER, {"role": "user", "content": "and"}]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASK + ANSWER},
        {"prompt": ASK + ANSWER},
        {"prompt": ASK + ANSWER, "completion": OTHER},
        {"prompt": ASK + ANSWER, "completion": ASK + OTHER},
        {"messages": ASK + ANSWER + OTHER},
        {"chosen": ASK + ANSWER + OTHER, "rejected": ASK + ANSWER + ANSWER},
    ],
)
def test_what_is_written_is_trained_on_behind_the_tokens_that_it_was_sampled_behind(tmp_path, tokenizer, row):
    whole = row.get("messages", row.get("chosen", []))
    if len(whole) == 3:  # two answers, which a column prompt and one of completions would join
        with pytest.raises(ValueError, match=r"rows.jsonl:1: the assistant answers twice .* got 'so' before"):
            read(tmp_path, [row], tokenizer)
        return
    found = read(tmp_path, [row], tokenizer)
    written = {"prompt": found.texts[0], "chosen": OTHER, "rejected": ANSWER}
    group = tokenise(read_row(written, ADAPTERS["preference"], RowRules()), tokenizer, TokenRules(99))
    assert group.prompt == found.encode(0, tokenizer)
    assert [tokenizer.decode(x) for x in group.completions] == ["not so", "so"]


def test_each_prompt_once_in_the_order_of_the_source(tmp_path, tokenizer):
    rows = [{"prompt": text} for text in ("the b", "the a", "the b", "the c", "the a", "the d")]
    found = read(tmp_path, rows, tokenizer)
    assert found.texts == ["the b", "the a", "the c", "the d"] and (found.rows, found.repeated) == (6, 2)
    found = read(tmp_path, rows, tokenizer, {"limit": 3})
    assert found.texts == ["the b", "the a", "the c"] and (found.rows, found.repeated) == (4, 1)


def test_the_first_tokens_of_a_text(tmp_path, tokenizer):
    """BOS does not count; a character that is cut within stays whole; a short text stays as it is."""
    text = "the film was good"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = read(
        tmp_path, [{"text": text}, {"text": "the"}, {"text": "€uro"}], tokenizer, {"prompt_tokens": 2}
    )
    assert found.texts == [tokenizer.decode(ids[:2]), "the", "€"]
    assert len(ids) > 2 and found.lengths[0] == 3
    found = read(tmp_path, [{"prompt": text, "completion": " x"}], tokenizer, {"prompt_tokens": 2})
    assert found.texts == [tokenizer.decode(ids[:2])]


@pytest.mark.parametrize(
    "row, options, message",
    [
        ({"text": "the"}, {}, r"rows.jsonl:1: plain text has no prompt; set generate.prompt_tokens"),
        ({"prompt": ASK}, {"prompt_tokens": 2}, r"rows.jsonl:1: .* this is a conversation; set it to null"),
        ({"prompt": ["x"]}, {}, r"rows.jsonl:1: prompt: a message .*; mend the row, or set data.on_bad_row"),
        ("{broken", {}, r"rows.jsonl:1: not JSON"),
        ({"question": "why"}, {}, r"rows.jsonl:1: columns \['question'\] are no known layout"),
    ],
)
def test_rows_that_have_no_prompt(tmp_path, tokenizer, row, options, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [row], tokenizer, options)


def test_a_slow_tokenizer_cannot_cut(tmp_path):
    with pytest.raises(ValueError, match=r"prompt_tokens needs a fast tokenizer, which ByT5Tokenizer is not"):
        read(tmp_path, [{"text": "the"}], ByT5Tokenizer(), {"prompt_tokens": 2})


def test_what_is_dropped_is_counted(tmp_path, tokenizer):
    rows = ["{broken", {"prompt": "the " * 50}, {"prompt": "the"}]
    found = read(tmp_path, rows, tokenizer, on_bad_row="drop", max_length=20)
    assert found.texts == ["the"] and found.rows == 3
    assert found.dropped == {"unreadable": 1, "prompt fills max_length": 1}
    assert [found.where[x][0].rpartition(":")[2] for x in found.dropped] == ["1", "2"]
    with pytest.raises(ValueError, match=r"no prompt in 1 row \(1: prompt fills max_length\)"):
        read(tmp_path, rows[1:2], tokenizer, max_length=20)


def test_what_the_template_makes_of_prompts_is_counted(tmp_path, tokenizer):
    named = [{"role": "user", "content": "why ", "name": "Ann"}]
    found = read(tmp_path, [{"prompt": named}, {"prompt": ASK}], tokenizer)
    assert found.notes == {"name of a speaker left out by the template: role user": 1}


def test_columns_that_are_not_used_are_counted(tmp_path, tokenizer):
    rows = [{"prompt": ASK, "system_message": text, "id": 3} for text in ("in French", "in German", "")]
    found = read(tmp_path, rows, tokenizer)
    assert found.unused == {"system_message": 2} and found.repeated == 2
    pairs = [{"prompt": "the", "chosen": " a", "rejected": " b", "note": "c"}]
    assert read(tmp_path, pairs, tokenizer).unused == {"note": 1}


def test_keys_of_messages_that_nothing_reads_are_counted(tmp_path, tokenizer):
    asked = [{"role": "user", "content": "why", "mood": "bad", "words": "b"}]
    rows = [{"prompt": asked}, {"prompt": ASK}]
    found = read(tmp_path, rows, tokenizer, chat_template_kwargs={"style": "short"})
    assert found.unused == {
        "mood (of messages)": 1,
        "words (of messages)": 1,
        "style (of chat_template_kwargs)": 2,
    }
    assert found.where["mood (of messages)"] == found.places[:1]
    assert found.where["style (of chat_template_kwargs)"] == found.places
    report = {"dropped": found.dropped, "rows": 2, "unused_columns": found.unused, "where": found.where}
    (line,) = findings(report)
    assert line.startswith(f"not used: mood (of messages) in 1 example (first: {found.places[0]}), words")


def test_folds_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"data\.folds: generate takes the prompts of all folds"):
        read(tmp_path, [{"prompt": "the"}], tokenizer, folds=2, fold=0)


def test_a_row_is_read_by_the_columns_of_its_source(tmp_path, tokenizer):
    """A null in a column, renamed or not, is no other layout; nor is a row without a score or an answer."""
    pairs = [
        {"prompt": "the", "chosen": " a", "rejected": " b", "m": 1.0},
        {"prompt": "a", "chosen": " a", "rejected": " b", "m": None},
        {"prompt": "one", "chosen": None, "rejected": None, "m": None},
    ]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(pairs).to_parquet(str(path))
    config = DataConfig(dataset_name=str(path), cache_dir=str(tmp_path / "cache"), columns={"margin": "m"})
    assert read_prompts(config, "train", tokenizer).texts == ["the", "a", "one"]
    assert read(tmp_path, pairs, tokenizer, columns={"margin": "m"}).texts == ["the", "a", "one"]
    scored = {"prompt": "the", "completions": [" a", " b"], "scores": [None, None]}
    assert read(tmp_path, [scored], tokenizer).texts == ["the"]
    only = [{"prompt": "the", "id": 1}, {"prompt": "a", "id": None}, {"prompt": None, "id": 2}]
    assert read(tmp_path, only[:2], tokenizer, columns={"margin": "id"}).texts == ["the", "a"]
    with pytest.raises(ValueError, match=r"rows.jsonl:3: prompt: is null"):
        read(tmp_path, only, tokenizer)


def test_best_and_worst():
    texts = ["a", "b", "c", "d"]
    assert choose_pair(texts, [1.0, 3.0, -2.0, 3.0], "best_worst", random_of(0)) == Pair(1, 2)
    assert choose_pair(texts, [1.0, 1.0, 1.0, 1.0], "best_worst", random_of(0)) == "tie"
    assert choose_pair(["a", "", "c"], [1.0, 9.0, 2.0], "best_worst", random_of(0)) == Pair(2, 0)
    assert choose_pair(["a", "b", "c"], [1.0, None, 2.0], "best_worst", random_of(0)) == Pair(2, 0)
    few = "fewer than two with text and score"
    assert choose_pair(["a", "", "c"], [1.0, 9.0, None], "best_worst", random_of(0)) == few
    assert choose_pair(["a", "a"], [1.0, 2.0], "best_worst", random_of(0)) == "equal texts"
    talk = [ANSWER, [{"role": "assistant", "content": ""}], OTHER]
    assert choose_pair(talk, [1.0, 9.0, 2.0], "best_worst", random_of(0)) == Pair(2, 0)


@pytest.mark.parametrize("scores", [[0.4, -0.3], [1.2, 0.0, -0.7]])
def test_labels_follow_bradley_and_terry(scores):
    """Every two completions are met equally often, and one wins with sigmoid(difference)."""
    texts, draws = ["a", "b", "c"][: len(scores)], 30_000
    random = np.random.default_rng(1)
    found = Counter(choose_pair(texts, scores, "bradley_terry", random) for _ in range(draws))
    combinations = len(scores) * (len(scores) - 1) // 2
    for i, j in itertools.combinations(range(len(scores)), 2):
        met = found[Pair(i, j)] + found[Pair(j, i)]
        wanted = 1 / (1 + math.exp(scores[j] - scores[i]))
        assert met / draws == pytest.approx(1 / combinations, abs=4 * math.sqrt(0.25 / draws))
        assert found[Pair(i, j)] / met == pytest.approx(wanted, abs=4 * math.sqrt(0.25 / met))


def test_a_pair_has_the_columns_of_the_preference_layout():
    row = pair_row("p", ["a", "b"], [1.5, -0.5], Pair(1, 0))
    assert row == {
        "prompt": "p",
        "chosen": "b",
        "rejected": "a",
        "score_chosen": -0.5,
        "score_rejected": 1.5,
        "margin": -2.0,
    }


def test_randomness_is_of_its_purpose_alone():
    assert random_of(1, "x", 2).random() == random_of(1, "x", 2).random()
    others = [random_of(1, "x", 3), random_of(2, "x", 2), random_of(1, "y", 2), random_of(1, "x", 2, 0)]
    assert len({random_of(1, "x", 2).random(), *(random.random() for random in others)}) == 5
