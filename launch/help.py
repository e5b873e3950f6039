"""What `madpo --help` shows beside the commands themselves: groups, examples, versions, completion."""

from __future__ import annotations

import glob
from importlib.metadata import version
from pathlib import Path

import typer

START, TRAIN, DATA, MODELS, LOOK = "Start", "Train", "Data", "Models", "Look and measure"
"""The groups of commands."""
FIRST_STEPS = "First steps: madpo init my.yaml, then the commands that it prints. One command: madpo train -h"
NAMES = {"help_option_names": ["-h", "--help"]}
"""Settings of the app's context, for it and all its commands."""


def guide(example: str, page: str) -> str:
    """The end of a command's help: an example, and the page that says more."""
    return f"Example: {example}\n\nSee: {page}"


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
