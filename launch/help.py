"""What `madpo --help` shows beside the commands themselves: groups, examples, versions, completion."""

from __future__ import annotations

import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer
import typer.core

START, TRAIN, DATA, MODELS, LOOK = "Start", "Train", "Data", "Models", "Look and measure"
"""The groups of commands."""
FIRST_STEPS = "First steps: madpo init my.yaml, then the commands that it prints. One command: madpo train -h"
NAMES = {"help_option_names": ["-h", "--help"]}
"""Settings of the app's context, for it and all its commands."""


def guide(example: str, page: str) -> str:
    """The end of a command's help: an example, and the page that says more."""
    return f"Example: {example}\n\nSee: {page}"


class ConfigCommand(typer.core.TyperCommand):
    """A command that knows how keys of the config are given, where somebody gives one as an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's NoSuchOption; some versions of typer have a click of their own
            if type(error).__name__ == "NoSuchOption":
                error.message += f". {as_override(error.option_name)}"  # type: ignore[attr-defined]
            raise


def as_override(option: str) -> str:
    """How to give an option that is a key of the config, or any key."""
    from madpo.trainer.config.foreign_keys import our_key
    from madpo.trainer.config.schema import Config

    key = our_key(option.lstrip("-").replace("-", "_"), Config)
    example = f"{key}=VALUE" if key else "optim.lr=2e-6"
    return f"Keys of the config are given without dashes, as in {example}"


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
