"""Functions of the user's in files of their own: whatever Python loads as a module is loaded here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from madpo.launch import call
from madpo.trainer.generate_config import JudgeConfig
from madpo.trainer.judges import FunctionJudge, check_judge

MODULE = """
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Weights:
    long: float = 0.5
    kept: list[str] = field(default_factory=list)


def score(prompts, completions):
    return [[Weights().long * len(text) for text in of_prompt] for of_prompt in completions]
"""


@pytest.fixture
def where(tmp_path) -> str:
    (tmp_path / "my_judge.py").write_text(MODULE)
    return f"{tmp_path / 'my_judge.py'}:score"


def of_a_recipe(where: str) -> Callable[..., Any]:
    found, text = call.find(where, Path())
    call.check(
        found,
        text.replace("def score(prompts", "def score(output, prompts"),
        {"prompts": 1, "completions": 1},
    )
    return call.load(found)


def of_a_judge(where: str) -> Callable[..., Any]:
    check_judge(JudgeConfig(function=where))
    return FunctionJudge(where)


LOADERS = [
    of_a_recipe,
    pytest.param(
        of_a_judge,
        marks=pytest.mark.xfail(
            strict=True, raises=AttributeError, reason="a judge's module is not in sys.modules while it loads"
        ),
    ),
]


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_with_a_dataclass_under_postponed_annotations(where, loader):
    """dataclasses look for the module by its name, among those that were imported."""
    assert loader(where)(["p"], [["ab", "abcd"]]) == [[1.0, 2.0]]
