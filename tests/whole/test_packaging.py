"""The package map, installed and from a wheel, and Hugging Face's `kernels` unharmed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_no_init_file_makes_a_top_level_folder_a_package():
    """`kernels/__init__.py` would shadow Hugging Face's kernels package for transformers.

    The objectives' has the names that outside code uses; the one in typings is the package's own.
    """
    if (ROOT / ".git").exists():  # not in a source archive
        tracked = subprocess.run(
            ["git", "ls-files", "*__init__.py"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert tracked.stdout.split() == ["trainer/objectives/__init__.py", "typings/madpo/__init__.py"]
    assert (ROOT / "trainer" / "objectives" / "__init__.py").is_file()
    for folder in ("kernels", "trainer", "launch", "benchmarks", "tests"):
        found = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("__init__.py")}
        assert found <= {"trainer/objectives/__init__.py"}


def test_a_real_kernels_package_wins_over_our_folder(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("NAME = 'the real one'\n")
    done = subprocess.run(
        [sys.executable, "-c", "import kernels; print(kernels.NAME)"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "the real one"


def test_the_wheel_holds_everything_and_runs_outside_the_checkout(tmp_path):
    # From a copy: a build folder left in the checkout could fill in for a module that is not mapped.
    leave_out = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", symlinks=True, ignore=leave_out)
    # With the setuptools of this environment: one of its own would be downloaded.
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    built = subprocess.run([*build, str(tmp_path / "source")], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("madpo-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"madpo"}
    for name in (
        "__init__.py",
        "launch/worker.py",
        "kernels/preference_loss.py",
        "benchmarks/head/run.py",
        "configs/demo.yaml",
        "configs/templates/dpo.yaml",
        "slurm/train.sbatch",
        "trainer/reports/templates/page.html.jinja",
        "trainer/reports/templates/style.css",
    ):
        assert f"madpo/{name}" in names
    venv.create(tmp_path / "venv", with_pip=False, system_site_packages=False)
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    # The dependencies are borrowed from this environment, without its editable madpo.
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    script = "import madpo; print(madpo.__file__, madpo.train.__name__, madpo.UserError.__name__)"
    for arguments, expected in (
        (("-m", "madpo.launch.cli", "--help"), "train"),
        (("-c", script), f"{site}/madpo/__init__.py train UserError"),
    ):
        done = subprocess.run(
            [str(tmp_path / "venv" / "bin" / "python"), *arguments],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(dependencies)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_importing_the_package_loads_nothing_else():
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "import madpo, madpo.kernels\n"
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(loaded - sys.stdlib_module_names)\n"
        "print(*(name for name in dir(madpo) if name in madpo.__all__))\n"
        "madpo.tarin\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    loaded, names = done.stdout.splitlines()
    assert loaded == "{'madpo'}" and "evaluate generate load_config train" in names
    assert "AttributeError: module 'madpo' has no attribute 'tarin'" in done.stderr
