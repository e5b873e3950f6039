"""`madpo init`: write a commented config, or a recipe, to start from. This module imports nothing heavy."""

from __future__ import annotations

import shlex
from itertools import takewhile
from pathlib import Path

from madpo.trainer.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parent.parent
FOLDER = PACKAGE / "configs" / "templates"
BESIDE = {"multi-node": PACKAGE / "slurm" / "train.sbatch"}
"""A file that a template's commands need, written into the same folder."""
COMMAND = "#   "
"""How a line of a template's head begins that is a command to type."""


def templates() -> dict[str, str]:
    """Name of a template -> what it is, the first line of its file."""
    paths = sorted(FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text().partition("\n")[0].removeprefix("# ") for path in paths}


def write(template: str, target: Path) -> list[Path]:
    """Write a template, with `target` as its name in it, and what it needs beside it; returns the paths.

    Raises UserError for an unknown template, and for a file that is there already.
    """
    from madpo.trainer.files import check_path, write_named  # whose hashes want a package

    if template not in templates():
        raise UserError(f"--template: {template}: no such template{nearest(template, templates())}")
    beside = BESIDE.get(template)
    paths = [target, *([target.with_name(beside.name)] if beside else [])]
    for path in paths:
        check_path(path)
        if path.exists():
            raise UserError(f"{path}: is there already; give another NAME, or remove it")
    text = (FOLDER / f"{template}.yaml").read_text()
    text = text.replace(f"{template}.yaml", shlex.quote(str(target)))
    text = text.replace(f"runs/{template}", f"runs/{target.stem}")
    if beside:
        text = text.replace(beside.name, shlex.quote(str(paths[1])))
        write_named(paths[1], beside.read_text(encoding="utf-8"))
    write_named(target, text)
    return paths


def commands(text: str) -> list[str]:
    """The commands that stand below a template's first line, in the order in which they are typed."""
    lines = takewhile(lambda line: line.startswith(COMMAND), text.splitlines()[1:])
    return [line.removeprefix(COMMAND) for line in lines]
