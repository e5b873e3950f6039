"""`madpo keys`, and the page that is made of the same list."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import command
from pydantic.fields import FieldInfo

from madpo.launch.keys import explain_keys, page
from madpo.trainer.config.effects import keys, sections_in
from madpo.trainer.config.schema import Config
from madpo.trainer.config.section import Section
from madpo.trainer.objectives.registry import OBJECTIVES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "config.md"
NAMES = [
    *Config.model_fields,
    "data.datasets",
    "generate.judge",
    "lr",
    "optim.lr",
    "beta",
    "objective.tau",
    *OBJECTIVES,
]


def test_the_page_is_that_of_the_schema():
    assert PAGE.read_text() == page(), "write it anew: python -m madpo.launch.keys docs/config.md"


def test_every_key_is_listed_once():
    holders = {key for key, field in _fields().items() if list(sections_in(field))}
    listed = [line.split("`")[1] for line in page().splitlines() if line.startswith("| `")]
    assert sorted(listed) == sorted(set(keys()) - holders)


def _fields(section: type[Section] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        found[prefix + name] = field
        for inner in sections_in(field):
            found |= _fields(inner, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("width", [60, 80, 110])
def test_nothing_is_wider_than_the_terminal(width):
    for name in (None, *NAMES):
        lines = explain_keys(name, width).splitlines()
        assert max(map(len, lines)) <= width and lines, name


def test_without_a_terminal_each_key_is_one_line():
    text = explain_keys("generate.judge.endpoint", None)
    assert (
        "  generate.judge.endpoint.timeout      seconds in which a whole reply must be there; "
        "a number above 0; "
        "default 60.0; can be changed once a run has begun\n"
    ) in text
    assert explain_keys("lr", None) == (
        "  optim.lr  highest learning rate, which warm-up ends at; a number above 0; default 2e-05 for "
        "supervised training (0.0002 for an adapter), 1e-05 for reward models (0.0001 for an adapter), 1e-06 "
        "for preferences (1e-05 for an adapter); fixed once a run has begun; in a recipe, "
        "another value makes a finished stage run again\n"
    )


def test_an_objective_shows_its_equation_and_parameters():
    status, out, _ = command("keys", "dpo")
    assert status == 0 and out.startswith("dpo: pairs, with a reference model\nL = -log sigmoid(beta D)")
    assert "a number above 0; default 0.1" in out
    assert command("keys", "sigmoid")[1] == out
    assert "It has no parameters." in explain_keys("nll", None)
    assert explain_keys("objective.tau", None) == explain_keys("tau", None)
    of_madpo = next(line for line in explain_keys("tau", None).splitlines() if line.endswith("; of madpo"))
    assert "threshold on the margin" in of_madpo and "default 7.0" in of_madpo
    of_dpo = next(line for line in explain_keys("beta", None).splitlines() if " dpo, " in line)
    assert of_dpo.startswith("  beta  strength with which") and " madpo, " in of_dpo


def test_other_trainers_names_are_explained():
    assert explain_keys("learning_rate", None).startswith(
        "learning_rate: it is optim.lr here\n  optim.lr  high"
    )
    assert explain_keys("adam_betas", None).count("optim.adam_beta") == 4
    assert explain_keys("report_to", None).startswith("report_to: metrics are in metrics.jsonl")
    overview = command("keys")[1]
    assert all(name in overview for name in (*OBJECTIVES, *Config.model_fields))


@pytest.mark.parametrize(
    "name, message",
    [
        ("waarmup_steps", "no section, objective or key of that name, did you mean 'warmup_steps'?"),
        (
            "flux",
            "no section, objective or key of that name; madpo keys lists the sections and the objectives",
        ),
        ("grpo", "madpo has no on-policy RL"),
    ],
)
def test_an_unknown_name_is_refused(name, message):
    status, out, errors = command("keys", name)
    assert (status, out) == (2, "") and message in errors
