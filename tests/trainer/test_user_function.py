"""A function that a config or a recipe names, as a judge and as a step of a recipe."""

import sys
from pathlib import Path

import pytest

from madpo.trainer import user_function
from madpo.trainer.config.generate import JudgeConfig
from madpo.trainer.errors import UserError
from madpo.trainer.sampling.judges import FunctionJudge, check_judge

JUDGE = """
from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Rule:
    word: str
    worth: float = 1.0


def score(prompts: list[str], completions: list[list[str]]) -> list[list[float]]:
    rule = Rule("good")
    return [[rule.worth * text.count(rule.word) for text in of_prompt] for of_prompt in completions]


number = 3
"""


@pytest.fixture
def judge_file(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "rules.py"
    path.write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    return path


@pytest.mark.parametrize("where", ["rules.py", "{}"], ids=["relative", "whole"])
def test_a_judge_may_define_a_dataclass_under_postponed_annotations(judge_file, where):
    """Which looks its module up by name, where it has to stand before the file is run."""
    judge = FunctionJudge(f"{where.format(judge_file)}:score")
    assert judge(["p"], [["good good", "bad"]]) == [[2.0, 0.0]]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("missing.py:score", "missing.py"),
        ("rules.py:missing", "has no attribute 'missing'"),
        ("rules.py:number", "is a int, no function"),
        ("no_such_module_here:score", "No module named"),
    ],
)
def test_a_judge_that_cannot_be_loaded_is_an_error_of_the_config(judge_file, where, message):
    with pytest.raises(UserError, match=rf"generate\.judge\.function: {where}.*{message}"):
        check_judge(JudgeConfig(function=where))


def test_a_module_of_the_working_directory_is_found_and_loaded(tmp_path, monkeypatch):
    (tmp_path / "words_of_this_test.py").write_text("def twice(x):\n    return 2 * x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    function = "words_of_this_test:twice"
    assert user_function.file_of(function, Path()) == tmp_path / "words_of_this_test.py"
    assert user_function.find(function, tmp_path)[0] == function
    assert user_function.load(function)(4) == 8


def test_a_file_is_looked_for_beside_the_recipe(judge_file, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert user_function.file_of("rules.py:score", Path()) is None
    found, text = user_function.find("rules.py:score", judge_file.parent)
    assert found == f"{judge_file}:score" and text == JUDGE
    assert user_function.load(found)([], [["good"]]) == [[1.0]]
