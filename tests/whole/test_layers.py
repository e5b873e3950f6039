"""Dependencies point one way. Read from the imports, so that no one has to remember."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = [
    "madpo.trainer.masking",
    "madpo.trainer.counted",
    "madpo.trainer.errors",
    "madpo.trainer.field_words",
    "madpo.trainer.packages",
    "madpo.trainer.files",
    "madpo.trainer.contents",
    "madpo.trainer.stopping",
    "madpo.trainer.outcome",
    "madpo.trainer.heartbeat",
    "madpo.trainer.waiting",
    "madpo.kernels",
    "madpo.trainer.objectives",
    "madpo.trainer.formats",
    "madpo.trainer.config",
    "madpo.trainer.out_of_memory",
    "madpo.trainer.disk_faults",
    "madpo.trainer.dist",
    "madpo.trainer.handshake",
    "madpo.trainer.user_function",
    "madpo.trainer.sequence_parallel",
    "madpo.trainer.agreement",
    "madpo.trainer.state",
    "madpo.trainer.checkpoints.folders",
    "madpo.trainer.run_folder",
    "madpo.trainer.restarts",
    "madpo.trainer.lives",
    "madpo.trainer.schedule",
    "madpo.trainer.data",
    "madpo.trainer.batches",
    "madpo.trainer.scoring_module",
    "madpo.trainer.head",
    "madpo.trainer.sliced_head",
    "madpo.trainer.zero3",
    "madpo.trainer.model",
    "madpo.trainer.throughput",
    "madpo.trainer.pair_margins",
    "madpo.trainer.metrics",
    "madpo.trainer.engine",
    "madpo.trainer.global_batch",
    "madpo.trainer.step",
    "madpo.trainer.checkpoints",
    "madpo.trainer.incidents",
    "madpo.trainer.reports.progress",
    "madpo.trainer.reference",
    "madpo.trainer.loop",
    "madpo.trainer.sampling",
    "madpo.trainer.reports",
    "madpo.trainer.stages",
    "madpo.benchmarks",
    "madpo.launch",
]
"""Lowest first; a module imports from its own layer and from lower ones."""

FOLDERS = ("kernels", "trainer", "benchmarks", "launch")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> int:
    found = [i for i, name in enumerate(LAYERS) if f"{module}.".startswith(f"{name}.")]
    assert found, f"{module} is in no layer; add it to LAYERS"
    return found[0]


def module_name(path: Path) -> str:
    return "madpo." + ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    own = layer(module_name(path))
    for module in imports(path):
        assert module.split(".")[0] not in ("kernels", "trainer", "benchmarks", "launch"), (
            f"write madpo.{module}"
        )
        if module.startswith("madpo."):
            assert layer(module) <= own, f"{path.name} imports {module} from a higher layer"


def test_kernels_import_torch_and_triton_only():
    allowed = {
        "torch",
        "triton",
        "madpo",
        "__future__",
        "collections",
        "dataclasses",
        "typing",
        "contextlib",
        "functools",
        "itertools",
        "os",
        "math",
        "enum",
    }
    for path in (ROOT / "kernels").rglob("*.py"):
        assert {module.split(".")[0] for module in imports(path)} <= allowed, path


TYPES = ("madpo.kernels.token_scores", "madpo.kernels.layout")
"""What kernels and trainer have in common: names of what is scored, and of parts of a batch."""


def test_only_the_heads_call_kernels():
    callers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "trainer").rglob("*.py")
        if any(
            module.startswith("madpo.kernels") and not module.startswith(TYPES) for module in imports(path)
        )
    }
    # The objectives' base names the data class that says which loss the kernels form.
    assert callers == {"trainer/head.py", "trainer/sliced_head.py", "trainer/objectives/base.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path):
    limit = 600 if "kernels" in path.parts else 400
    assert len(path.read_text().splitlines()) <= limit


TESTS = [path for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name not in ("whole", "faults")]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_test_file_says_what_it_is_about(path):
    """It stands where its subject does: `tests/trainer/test_loop.py` for `trainer/loop.py`, a longer name for
    a part of it; or has the name of the folder; or is about several files and stands in whole or faults."""
    folder = ROOT / path.parent.relative_to(ROOT / "tests")
    name, subjects = path.stem.removeprefix("test_"), {file.stem for file in folder.glob("*.py")}
    is_about_one = any(name == subject or name.startswith(f"{subject}_") for subject in subjects)
    assert is_about_one or name.startswith(folder.name), f"no subject of that name in {folder}"


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
ODD = re.compile(r"(Of |The same\b|As `|As [a-z]|Inside\b|In which\b)")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_the_thing_or_begin_with_a_verb(path):
    """As far as a pattern can tell: see CONTRIBUTING.md for the rule."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, DOCUMENTED) and (text := ast.get_docstring(node)):
            assert not ODD.match(text), f"{path.name}: {text.splitlines()[0]}"
