"""A function that a config or a recipe names, as a judge and as a step of a recipe."""

import json.decoder
import sys
from pathlib import Path

import pytest

from madpo.trainer import errors, user_function
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
        ("missing.py:score", r"there is no file .*missing\.py"),
        ("rules.py:missing", "there is no such function in it"),
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


RAISES = "raise SystemExit('was imported')\n"


@pytest.mark.parametrize("inner", ["__init__.py", None], ids=["package", "namespace"])
def test_the_file_of_a_module_is_found_without_importing_the_packages_it_is_in(tmp_path, monkeypatch, inner):
    folder = tmp_path / "outer_of_this_test" / "inner"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text(RAISES)
    (folder / "steps.py").write_text(f"{RAISES}def f(): ...\n")
    if inner:
        (folder / inner).write_text(RAISES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert user_function.file_of("outer_of_this_test.inner.steps:f", Path()) == folder / "steps.py"
    assert user_function.file_of("outer_of_this_test.inner.other:f", Path()) is None
    assert user_function.file_of("outer_of_this_test.other.steps:f", Path()) is None
    assert user_function.find("outer_of_this_test.inner.steps:f", tmp_path)[1].startswith(RAISES)
    assert not [name for name in sys.modules if name.startswith("outer_of_this_test")]


@pytest.mark.parametrize("module", ["", ".", "a..b", "json.decoder.x", "sys", "no such"])
def test_what_is_no_module_has_no_file(module):
    assert user_function.file_of(f"{module}:f", Path()) is None


def test_modules_of_installed_packages_are_found():
    assert user_function.file_of("json.decoder:f", Path()) == Path(json.decoder.__file__)
    assert user_function.file_of("madpo.trainer.errors:f", Path()) == Path(errors.__file__)
