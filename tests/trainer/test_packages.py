"""The command that a message tells people to type installs into the Python that needs the package."""

from __future__ import annotations

import subprocess
import sys

import pytest

from madpo.trainer import packages


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """A folder that is all the shell looks for commands in."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_pip_alone_is_enough_where_it_belongs_to_this_python(searched, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(searched / "python"))
    (searched / "pip").write_text("#!/bin/sh\n")
    (searched / "pip").chmod(0o755)
    assert packages.install("trl==1.16.0") == "pip install trl==1.16.0"


def test_else_the_command_names_this_python_and_runs(searched):
    command = packages.install("madpo[peft]")
    assert command == f"{sys.executable} -m pip install 'madpo[peft]'"
    version = command.replace("install 'madpo[peft]'", "--version")
    assert subprocess.run(version, shell=True, capture_output=True, check=False).returncode == 0


def test_an_environment_without_pip_is_one_of_uv(searched, monkeypatch):
    monkeypatch.setattr(packages, "find_spec", {"pip": None}.get)
    assert packages.install("vllm") == f"uv pip install --python {sys.executable} vllm"
