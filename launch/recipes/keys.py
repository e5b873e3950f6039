"""The key of a stage: a hash that changes with everything that the stage's result depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from madpo.launch.recipes.read import Recipe, Stage
from madpo.trainer import user_function
from madpo.trainer.config.strict_yaml import named_texts


def keys(
    recipe: Recipe,
    content: Callable[[Path, Path], str],
    source: Callable[[Stage], str],
) -> dict[str, str]:
    """Stage -> its key.

    The key covers the stage's task, its config or arguments, the keys of the stages it depends on, the
    contents of the files and folders it reads that no stage of this recipe writes, and for a call the source
    of its module. `content(path, without)` hashes a file or folder, without a folder in it.
    """
    hashes: dict[str, str] = {}
    whole = recipe.folder.resolve()
    for stage in recipe.stages:
        parts = {
            "task": stage.task,
            "given": stage.portable if stage.function else _with_effect(stage.portable),
            "after": {name: hashes[name] for name in stage.after},
            "reads": {text: content(path, whole) for text, path in reads(stage, recipe).items()},
            "function": [stage.function, source(stage)] if stage.function else None,
        }
        hashes[stage.name] = xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())
    return hashes


def reads(stage: Stage, recipe: Recipe) -> dict[str, Path]:
    """Value -> absolute path, for the stage's values that name existing files or folders which it reads.

    Left out are those that a stage of the recipe writes. A folder may contain the recipe's folder.
    """
    whole = recipe.folder.resolve()
    written = [whole / other.name for other in recipe.stages]
    paths = dict[str, Path]()
    for key, text in named_texts(stage.given):
        path = _read_by(stage, key, text)
        if path not in (None, whole) and not any(path.is_relative_to(folder) for folder in written):
            paths[text] = path
    return paths


def _read_by(stage: Stage, key: str, text: str) -> Path | None:
    """The file or folder that a value names, if the stage reads it and it exists."""
    kind = "path" if stage.function else _kind_of_name(key)
    if kind == "function":
        return user_function.file_of(text, Path())
    if not text or kind != "path" or not os.path.exists(os.path.expanduser(text)):
        return None
    path = Path(text).expanduser().resolve()
    # As an argument of a call, "." or "/" is more likely text than data.
    return None if stage.function and Path.cwd().is_relative_to(path) else path


def _kind_of_name(key: str) -> str | None:
    """What a value of the config key names whose content counts: "path", "function" or nothing."""
    from madpo.trainer.config.effects import keys

    return keys()[key].names if key in keys() else None


def _with_effect(tree: dict[str, Any]) -> dict[str, Any]:
    """The config's tree without keys that change no result, and without sections that held only such."""
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
