"""Read the tree of a config from a file, or from the folder of a run, and the objective that a run had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from madpo.trainer.config import strict_yaml
from madpo.trainer.errors import UserError
from madpo.trainer.files import check_path

FILE = "config.yaml"
"""A run's resolved config, in its folder."""


def read_tree(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The sections in a YAML file. A run folder stands for its config.yaml, with itself as `output_dir`.

    An `objective` that is a name becomes a section, so that overrides can add to it.

    Raises UserError for a folder without one, and for a file that holds no sections.
    """
    check_path(path)
    folder = Path(path)
    if not folder.is_dir():
        tree = strict_yaml.read(folder)
        return {**tree, "objective": as_block(tree["objective"])} if tree.get("objective") else tree
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} is a folder without {FILE}, so no run's; name a YAML file or a run folder")
    return {**strict_yaml.read(folder / FILE), "output_dir": str(folder)}


def with_objective_of_run(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the objective that the run in its `output_dir` had, if it names none itself."""
    objective, folder = as_block(tree.get("objective")), tree.get("output_dir")
    if not isinstance(objective, dict) or "loss_type" in objective or not isinstance(folder, str):
        return tree
    file = Path(folder) / FILE
    if not os.path.isfile(file):
        return tree
    return {**tree, "objective": {**as_block(strict_yaml.read(file).get("objective")), **objective}}


def as_block(objective: Any) -> Any:
    """An `objective` in the form of a mapping: a name, or a list of names, is its loss_type."""
    return {"loss_type": objective} if isinstance(objective, str | list) else objective or {}
