"""The key of a stage, which changes with everything that the stage's result depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from madpo.launch.recipes.read import Recipe, Stage, _names
from madpo.trainer import user_function
from madpo.trainer.config.strict_yaml import named_texts


def keys(
    recipe: Recipe,
    content: Callable[[Path, Path], str],
    source: Callable[[Stage], str],
) -> dict[str, str]:
    """Stage -> a hash of all that its result depends on.

    That is its task, config or arguments, the keys of the stages before it, the content of the files and
    folders it reads that no stage of this recipe writes, and for a call the source of its module.
    `content` hashes its first argument, a file or folder, without the second, which may lie in it.
    """
    found: dict[str, str] = {}
    whole = recipe.folder.resolve()
    for stage in recipe.stages:
        parts = {
            "task": stage.task,
            "given": stage.portable if stage.function else _with_effect(stage.portable),
            "after": {name: found[name] for name in stage.after},
            "reads": {text: content(path, whole) for text, path in reads(stage, recipe).items()},
            "function": [stage.function, source(stage)] if stage.function else None,
        }
        found[stage.name] = xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())
    return found


def reads(stage: Stage, recipe: Recipe) -> dict[str, Path]:
    """Values that name files or folders which are there, and in which no stage of the recipe writes ->
    their whole paths. A folder may hold that of the recipe."""
    whole = recipe.folder.resolve()
    written = [whole / other.name for other in recipe.stages]
    found = dict[str, Path]()
    for key, text in named_texts(stage.given):
        path = _read_by(stage, key, text)
        if path not in (None, whole) and not any(path.is_relative_to(folder) for folder in written):
            found[text] = path
    return found


def _read_by(stage: Stage, key: str, text: str) -> Path | None:
    """The file or folder that a value names, if the stage reads it and it is there."""
    names = "path" if stage.function else _names(key)
    if names == "function":
        return user_function.file_of(text, Path())
    names_one = bool(text) and names == "path"
    if not names_one or not os.path.exists(os.path.expanduser(text)):
        return None
    path = Path(text).expanduser().resolve()
    # To a call, "." and "/" are more often text than data.
    return None if stage.function and Path.cwd().is_relative_to(path) else path


def _with_effect(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without what changes no result, and without the sections that held nothing else."""
    from madpo.trainer.config.effects import keeps_results, keys

    out = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    model = tree.get("model")
    router_loss = isinstance(model, dict) and bool(model.get("router_aux_loss_coef"))
    for section, values in out.items():
        for key in list(values) if isinstance(values, dict) else []:
            name = f"{section}.{key}"
            if name in keys() and keeps_results(name, router_loss):
                del values[key]
    return {key: value for key, value in out.items() if value != {} or tree[key] == {}}
