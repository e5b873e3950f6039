"""Help, versions and completion of the command line."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import command
from typer.testing import CliRunner

from madpo.launch.cli import app
from madpo.launch.help import complete_config

ROOT = Path(__file__).resolve().parents[2]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_a_group_an_example_that_parses_and_a_page_that_is_there(name):
    registered = COMMANDS[name]
    match = re.fullmatch(r"Example: madpo (.*)\n\nSee: (\S+)", registered.epilog)
    assert match and registered.rich_help_panel
    called, *arguments = shlex.split(match[1])
    assert called == name
    registered.make_context(name, arguments)
    assert (ROOT / match[2]).is_file()


def test_the_version_is_that_of_what_is_installed():
    libraries = ("madpo", "torch", "deepspeed", "transformers")
    assert command("--version") == (0, "".join(f"{name} {version(name)}\n" for name in libraries), "")


def test_h_is_help_of_a_command_too():
    assert command("-h")[1] == command("--help")[1]
    assert "--fresh" in command("train", "-h")[1]


def test_tab_completes_configs_run_folders_and_templates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dpo.yaml", "dpo.jsonl", "data[1].yaml"):
        Path(name).touch()
    (tmp_path / "drafts").mkdir()
    assert complete_config("d") == ["data[1].yaml", "dpo.yaml", "drafts/"]
    assert complete_config("data[") == ["data[1].yaml"]
    assert complete_config(f"{tmp_path}/dp") == [f"{tmp_path}/dpo.yaml"]
    assert completed(monkeypatch, "madpo train dp") == ["dpo.yaml"]
    assert completed(monkeypatch, "madpo init --template si") == ["simpo"]


def completed(monkeypatch, line: str) -> list[str]:
    """What the shell is given to complete the last word with."""
    monkeypatch.setenv("_MADPO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    return command()[1].split()


@pytest.mark.parametrize(("option", "key"), [("--learning-rate", "optim.lr=VALUE"), ("--x", "optim.lr=2e-6")])
def test_a_key_that_is_given_as_an_option_is_told_how_keys_are_given(option, key):
    result = CliRunner().invoke(app, ["train", "my.yaml", option, "1"])
    said = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and f"Keys of the config are given without dashes, as in {key}" in said
