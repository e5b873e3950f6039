"""The kernels, their tests and the head's benchmark need torch, Triton and numpy alone.

On a machine with a GPU the rest may be missing, or be of another version, and none of it may be in the way.
"""

from pathlib import Path

from absent import python_without

ROOT = Path(__file__).resolve().parents[2]
TRAINER = ("deepspeed", "datasets", "pydantic", "pydantic_core", "xxhash", "psutil", "yaml", "pyarrow")
MODELS = ("transformers", "tokenizers", "safetensors", "accelerate", "peft", "bitsandbytes", "flash_attn")
PEERS = ("trl", "liger_kernel", "cut_cross_entropy")
SCREEN = ("typer", "click", "rich", "matplotlib")
ALL = (*TRAINER, *MODELS, *PEERS, *SCREEN)
HELPERS = ("interpreter", "kernel_cases", "absent")
TINY = ("--shape", "small-1003", "--rows", "24", "--head", "madpo", "--iterations", "1", "--no-variants")


def test_nothing_of_the_kernels_their_tests_and_the_heads_benchmark_imports_anything_else():
    modules = [f"madpo.kernels.{path.stem}" for path in sorted((ROOT / "kernels").glob("*.py"))]
    benchmark = [path.stem for path in sorted((ROOT / "benchmarks" / "head").glob("*.py"))]
    modules += [f"madpo.benchmarks.head.{name}" for name in benchmark if name != "__main__"]
    assert len(benchmark) > 6 and len(modules) > len(benchmark) + 10
    tests = ROOT / "tests"
    files = [tests / "conftest.py", *(tests / "support" / f"{name}.py" for name in HELPERS)]
    files += sorted((tests / "kernels").glob("*.py"))
    assert len(files) > len(HELPERS) + 5
    code = (
        "import importlib, importlib.util, sys\n"
        f"for path in {[str(path) for path in files]}:\n"
        "    spec = importlib.util.spec_from_file_location('tests' + path.replace('/', '_')[:-3], path)\n"
        "    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)\n"
        "    spec.loader.exec_module(module)\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
    )
    done = python_without(ALL, "-c", code)
    assert done.returncode == 0, done.stderr


def test_the_heads_benchmark_runs_without_the_rest_of_the_package(tmp_path):
    done = python_without(ALL, "-m", "madpo.benchmarks.head", *TINY, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "small-1003, 24 rows, bfloat16, plain" in done.stdout and "GEMMs alone" in done.stdout
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}
    assert "of limit" in done.stdout and "from logits" not in done.stdout


def test_a_package_that_is_hidden_is_really_gone():
    """Without this the tests above could not fail."""
    code = (
        "import importlib.metadata, importlib.util\n"
        "assert importlib.util.find_spec('pytest') is None\n"
        "assert not [x for x in importlib.metadata.distributions() if x.name == 'pytest']\n"
        "import pytest\n"
    )
    done = python_without(["pytest"], "-c", code)
    assert done.returncode == 1 and "ModuleNotFoundError: No module named 'pytest'" in done.stderr
