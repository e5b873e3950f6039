"""What the pages name is there: files, links, config keys, make targets, tests, and the names in the code."""

from __future__ import annotations

import os
import re
import shlex
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch

from madpo.launch.local import Task
from madpo.trainer.config.effects import keys
from madpo.trainer.config.schema import load
from madpo.trainer.objectives.madpo import MADPOParams

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS = {"runs", "build", "dist", "__pycache__"}
HISTORY = {"docs/LOG.md"}
"""Pages that say what was, also of files that have moved since."""
YOURS = {"my_data.py", "path/file.py", "file.py", "script.py"}
"""Files of a user, in examples."""
ABSENT = {"kernels/__init__.py"}
"""Files that are named because there must be none."""
COMMANDS = {task: task for task in get_args(Task)} | {
    "config": "train",
    "show-data": "train",
    "check-data": "train",
}
"""Commands that take a config -> the task that it is checked for."""


@cache
def files() -> list[str]:
    """Every file and folder of the project, relative to its root."""
    out = list[str]()
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [x for x in folders if x not in NOT_OURS and not x.startswith(".")]
        here = Path(folder).relative_to(ROOT)
        out += [(here / name).as_posix() for name in (*folders, *names)]
    return out


PAGES = [name for name in files() if name.startswith("docs/") or name.endswith("README.md")]
PAGES = sorted({"CONTRIBUTING.md", *(name for name in PAGES if name.endswith(".md"))} - HISTORY)
FOLDERS = sorted(name for name in files() if "/" not in name and (ROOT / name).is_dir())


def is_there(name: str, page: str) -> bool:
    """Whether a name is the end of a path of the project, or a path from the page's folder."""
    if "*" in name:
        return any(ROOT.glob(name))
    name = name.rstrip("/")
    return (ROOT / page).parent.joinpath(name).exists() or any(
        f"/{path}".endswith(f"/{name}") for path in files()
    )


def named_files(text: str) -> set[str]:
    """Paths that begin with a folder of the project, and names of Python files."""
    folders = "|".join(map(re.escape, FOLDERS))
    paths = re.findall(rf"(?<![\w./<>-])(?:{folders})/[\w./*-]*[\w*/]", text)
    modules = re.findall(r"(?<![\w./<>-])[\w./-]+\.py\b", text)
    return {*paths, *modules} - YOURS - ABSENT


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text()
    missing = sorted(name for name in named_files(text) if not is_there(name, page))
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    broken = list[str]()
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        if not there.exists() or (heading and heading not in headings(there)):
            broken.append(target)
    assert not broken


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_config_keys_that_a_page_names_exist(page):
    sections = {name.split(".")[0] for name in keys() if "." in name}
    code = re.findall(r"`([^`\n]+)`", (ROOT / page).read_text())
    found = (re.fullmatch(r"([a-z_]+)\.([a-z_\d]+)(?:\.\w+)*(?:[:=].*)?", each) for each in code)
    named = {f"{match[1]}.{match[2]}" for match in found if match and match[1] in sections}
    assert not sorted(name for name in named - keys().keys() if not is_there(name, page))


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_and_tests_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(re.findall(r"`make ([\w-]+)", text)) <= set(targets)
    named = set(re.findall(r"`(test_\w+)`", text)) - {name.split(".")[-1] for name in keys()}
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert not sorted(
        name for name in named if f"def {name}(" not in tests and not is_there(f"{name}.py", page)
    )


@pytest.mark.parametrize("page", ["README.md", "docs/your_data.md"])
def test_printed_commands_take_the_config_that_is_printed_above_them(page, tmp_path):
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```(yaml|sh)\n(.*?)```", text, flags=re.DOTALL)
    config = next(block for kind, block in blocks if kind == "yaml" and block.startswith("output_dir:"))
    shell = "\n".join(block for kind, block in blocks if kind == "sh").replace("\\\n", " ")
    checked = 0
    for line in shell.splitlines():
        match shlex.split(line, comments=True):
            case ["madpo", command, file, *overrides] if command in COMMANDS and file.endswith(".yaml"):
                (tmp_path / file).write_text(config)
                load(tmp_path / file, [x for x in overrides if "=" in x], COMMANDS[command])
                checked += 1
    assert checked >= 2


def test_the_weights_in_the_page_about_tau():
    """The table of margins and thresholds, against MADPO's weight with its defaults."""
    text = (ROOT / "docs/tau.md").read_text()
    margins = torch.tensor([float(cell) for cell in row_of(text, "margin h")], dtype=torch.float64)
    for tau in (7, 4, 2, 1):
        weights = MADPOParams(tau=tau).weight(margins)
        assert row_of(text, f"τ = {tau}") == [f"{weight:.3f}" for weight in weights]


def row_of(text: str, title: str) -> list[str]:
    """The cells of a table's row, without its title."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_names_in_the_life_of_a_step_are_in_the_file_that_is_named_beside_them():
    """A name of code stands in a file, or folder, of its line; a row without one is about those above it."""
    missing, count, places = list[str](), 0, set[str]()
    for line in (ROOT / "docs/life_of_a_step.md").read_text().splitlines():
        places = named_files(line) or (places if line.startswith("|") else set())
        code = "\n".join(code_of(ROOT / name) for name in places)
        for name in re.findall(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`", line):
            if name in keys() or is_there(name, "docs/life_of_a_step.md"):
                continue
            count += 1
            missing += [name for part in name.split(".") if not re.search(rf"\b{part}\b", code)]
    assert not missing
    assert count > 20


def code_of(place: Path) -> str:
    """The text of a file, or of all Python files in a folder."""
    return "\n".join(path.read_text() for path in (place.rglob("*.py") if place.is_dir() else [place]))
