"""What `madpo --help` shows beside the commands themselves: groups, examples, versions, completion."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
import typer.core

GROUPS = START, TRAIN, DATA, MODELS, LOOK = "Start", "Train", "Data", "Models", "Look and measure"
"""The groups of commands, in the order of the help."""
FIRST_STEPS = "First: madpo init my.yaml, then what it prints. Help: madpo train -h"
NAMES = {"help_option_names": ["-h", "--help"]}
"""Settings of the app's context, for it and all its commands."""


def guide(example: str, page: str) -> str:
    """The end of a command's help: an example, and the page that says more."""
    return f"Example: {example}\n\nSee: {page}"


class ConfigCommand(typer.core.TyperCommand):
    """A command that knows how keys of the config are given, where somebody gives one as an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)  # parsing takes them out
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's NoSuchOption; some versions of typer have a click of their own
            if type(error).__name__ == "NoSuchOption":
                _explain(error, given)
            raise


def _explain(error: Any, args: Sequence[str]) -> None:
    """Say how to give an option that is a key of the config; any other, if no option of ours is near it."""
    from madpo.trainer.config.foreign_keys import our_key
    from madpo.trainer.config.schema import Config

    option = error.option_name
    name = option.lstrip("-").replace("-", "_").rpartition(".")[2]
    key = our_key(name, Config)
    if key is None and error.possibilities:
        return
    error.possibilities = None
    example = f"{key}={_value_of(option, args)}" if key else "optim.lr=2e-6"
    error.message += f". Keys of the config are given without dashes, as in {example}"


def _value_of(option: str, args: Sequence[str]) -> str:
    """What stands behind the option, or behind its equals sign."""
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        if arg.startswith(f"{option}="):
            return arg.partition("=")[2]
        if arg == option and following and not following.startswith("-"):
            return following
    return "VALUE"


def complete_config(incomplete: str) -> list[str]:
    """The YAML files, and folders, that a config's name so far can go on to."""
    found = sorted(glob.glob(f"{glob.escape(incomplete)}*"))
    names = [f"{path}/" if Path(path).is_dir() else path for path in found]
    return [name for name in names if name.endswith(("/", ".yaml", ".yml"))]


def versions() -> list[str]:
    """Name and version of madpo and of what it stands on, without importing them."""
    return [f"{name} {version(name)}" for name in ("madpo", "torch", "deepspeed", "transformers")]


def show_versions(wanted: bool) -> None:
    if wanted:
        print("\n".join(versions()))
        raise typer.Exit
