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


AS_OPTIONS = {
    "--lr 1e-4": "optim.lr=1e-4",
    "--learning-rate=3e-6": "optim.lr=3e-6",
    "--num_train_epochs": "train.num_train_epochs=VALUE",
    "--optim.lr 3": "optim.lr=3",
    "--x 1": "optim.lr=2e-6",
}


@pytest.mark.parametrize("options", AS_OPTIONS)
def test_a_key_that_is_given_as_an_option_is_told_how_keys_are_given(options):
    status, said = refused(options)
    assert status == 2
    assert said.endswith(f"Keys of the config are given without dashes, as in {AS_OPTIONS[options]}")


def test_a_slip_for_an_option_of_ours_is_told_which():
    assert refused("--frsh")[1].endswith("No such option: --frsh (Possible options: --fresh)")


def refused(options: str) -> tuple[int, str]:
    """Exit status and words of `madpo train` with the options."""
    result = CliRunner().invoke(app, ["train", "my.yaml", *options.split()])
    return result.exit_code, " ".join(re.sub("[│╰╯─]", " ", result.output).split())
