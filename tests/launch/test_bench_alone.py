"""`madpo bench` of the loss head starts where the trainer's packages are missing; only `step` needs them."""

import pytest
from absent import python_without

MISSING = ("deepspeed", "datasets", "transformers", "peft", "accelerate", "xxhash", "yaml", "psutil")
OF_TYPER = ("pydantic", "pydantic_core")
"""Missing too; but some versions of typer read options with it, so a command cannot be run without."""
TINY = ("--shape", "small-1003", "--rows", "24", "--head", "madpo", "--iterations", "1", "--no-variants")


@pytest.mark.parametrize("command", [("bench",), ("bench", "step")], ids=" ".join)
def test_its_help_needs_none_of_them(command):
    done = python_without(MISSING, "-m", "madpo.launch.cli", *command, "--help")
    assert done.returncode == 0, done.stderr
    assert "--output" in done.stdout


def test_the_command_line_imports_none_of_them():
    """Nor does what it then calls: tests/kernels/test_kernels_alone.py."""
    done = python_without((*MISSING, *OF_TYPER), "-c", "import madpo.launch.cli, madpo.launch.bench")
    assert done.returncode == 0, done.stderr


def test_it_measures_without_them(tmp_path):
    done = python_without(MISSING, "-m", "madpo.launch.cli", "bench", *TINY, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "small-1003, 24 rows, bfloat16, plain" in done.stdout and "from logits" not in done.stdout
    assert len(list(tmp_path.glob("head_cpu_*.json"))) == 1


def test_a_step_is_what_needs_them(tmp_path):
    done = python_without(MISSING, "-m", "madpo.launch.cli", "bench", "step", "--output", str(tmp_path))
    assert done.returncode == 1 and "ModuleNotFoundError: No module named" in done.stderr
