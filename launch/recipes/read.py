"""Read a recipe: a YAML file of stages that build on each other, into the order in which they can run.

docs/recipes.md has the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from madpo.launch.worker import TASKS
from madpo.trainer.config import strict_yaml
from madpo.trainer.config.strict_yaml import named_texts
from madpo.trainer.errors import UserError, nearest

CALL = "call"
RECIPE_KEYS = ("output_dir", "vars", "defaults", "stages")
REQUIRED = {
    "output_dir": (str, "a folder for the runs of all stages, as in runs/recipe"),
    "stages": (dict, "a mapping from names to stages"),
}
"""Key -> its type, and what it is."""
KEYS_OF_A_CALL = ("task", "for", "after", "function", "arguments")
KEYS_OF_A_TASK = ("task", "for", "after", "file", "config")
KINDS = {"loss_type", "model_type"}
REFERENCE = re.compile(r"\$\{([^${}]*)\}")
MOST_SUBSTITUTIONS = 100
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Stage:
    name: str
    task: str
    given: dict[str, Any]  # the config's tree without output_dir, or the arguments of a call
    portable: dict[str, Any]  # `given` with names of stages instead of their folders
    function: str | None  # the function of a call
    after: tuple[str, ...]  # the stages that it depends on


@dataclass(frozen=True)
class Recipe:
    path: Path
    folder: Path
    stages: tuple[Stage, ...]  # each after those it depends on, else in the file's order

    def needed_for(self, patterns: Sequence[str]) -> Recipe:
        """The recipe with only the stages that match the patterns, and all that these depend on.

        No patterns: all stages. Raises UserError for a pattern that matches none.
        """
        if not patterns:
            return self
        names = [stage.name for stage in self.stages]
        wanted = {name for pattern in patterns for name in _matching(pattern, names, f"{self.path}: --only")}
        for stage in reversed(self.stages):
            if stage.name in wanted:
                wanted.update(stage.after)
        return Recipe(self.path, self.folder, tuple(stage for stage in self.stages if stage.name in wanted))


def read(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, apply overrides, expand its loops and variables. UserError names the stage and the key.

    An override begins with a key of the recipe, as in vars.scale=0.2; or with the name or pattern of stages,
    and goes on with a key of their config or arguments, as in 'dpo-*.optim.lr=1e-6'.
    """
    overrides = list(overrides)
    own = [text for text in overrides if re.split("[.=]", text, maxsplit=1)[0] in RECIPE_KEYS]
    written = strict_yaml.read(path)
    tree = strict_yaml.override(written, own)
    if "stages" not in tree and tree.keys() & {"model", "data"}:
        raise UserError(f"{path}: this is the config of one run; madpo train {path} trains it")
    _check_keys(tree, RECIPE_KEYS, str(path))
    for key, (kind, words) in REQUIRED.items():
        if not isinstance(tree.get(key), kind) or not tree[key]:
            raise UserError(f"{path}: {key}: is required, {words}")
    variables = _mapping(tree, "vars", str(path))
    _check_keys(variables, list(_mapping(written, "vars", str(path))), f"{path}: vars")
    if any("${" in text for _, text in named_texts(variables)):
        raise UserError(f"{path}: vars: their values are plain, and hold no ${{...}}")
    defaults = _mapping(tree, "defaults", str(path))

    bodies: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {}
    for template, entry in tree["stages"].items():
        where = f"{path}: stages.{template}"
        _check_entry(entry, where)
        for scope in _scopes(entry, variables, where):
            name = str(_substitute(template, partial(_at, scope), where, scope))
            if not NAME.fullmatch(name) or name in RECIPE_KEYS:
                raise UserError(f"{where}: {name!r} names a folder: letters, digits and - _ . only")
            if name in scope or name in bodies:
                raise UserError(
                    f"{where}: {name!r} is the name of another stage or var; every variable of `for` "
                    "belongs into the name"
                )
            bodies[name] = entry, scope, _body(entry, defaults, path.parent, where)
    for text in overrides:
        if text not in own:
            _override(bodies, text)
    folder = Path(tree["output_dir"])
    stages = [_stage(name, bodies, folder, f"{path}: stages.{name}") for name in bodies]
    return Recipe(path, folder, tuple(_in_order(stages, path)))


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `above` over `below`, section by section. A mapping that names its kind replaces the old one."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and not KINDS & value.keys():
            value = merge(old, value)
        out[key] = value
    return out


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: a stage is a mapping with a task, got {entry!r}")
    task = entry.get("task")
    if task != CALL and task not in TASKS:
        raise UserError(f"{where}.task: {task!r} is no task{nearest(str(task), [*TASKS, CALL])}")
    _check_keys(entry, KEYS_OF_A_CALL if task == CALL else KEYS_OF_A_TASK, where)
    if task == CALL and not isinstance(entry.get("function"), str):
        raise UserError(f"{where}.function: a call names one, as module:name or path/file.py:name")


def _check_keys(tree: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in tree:
        if key not in allowed:
            raise UserError(f"{where}: {key}: unknown key{nearest(key, allowed)}")


def _mapping(tree: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = tree.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{where}: {key}: a mapping, got {value!r}")
    return value or {}


def _scopes(entry: Mapping[str, Any], variables: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The variables of every stage that an entry stands for: one stage, or the product of its `for`."""
    loops = _mapping(entry, "for", where)
    values = {
        key: _at(variables, match[1]) if (match := REFERENCE.fullmatch(str(choices))) else choices
        for key, choices in loops.items()
    }
    for key, choices in values.items():
        if not isinstance(choices, list) or not choices:
            raise UserError(f"{where}.for.{key}: a list of values, got {choices!r}")
        if key in variables:
            raise UserError(f"{where}.for.{key}: is the name of a var")
    for combination in product(*values.values()):
        yield {**variables, **dict(zip(values, combination, strict=True))}


def _body(entry: Mapping[str, Any], defaults: dict[str, Any], beside: Path, where: str) -> dict[str, Any]:
    """A stage's tree before substitution: its arguments, or `defaults`, `file` and `config` merged."""
    if entry["task"] == CALL:
        return _mapping(entry, "arguments", where)
    config = _mapping(entry, "config", where)
    if "output_dir" in config:
        raise UserError(f"{where}.config.output_dir: remove it; a stage's folder is named after the stage")
    file = entry.get("file")
    tree = merge(defaults, strict_yaml.read(beside / str(file)) if file is not None else {})
    tree.pop("output_dir", None)
    return merge(tree, config)


def _override(bodies: dict[str, Any], text: str) -> None:
    """Apply `stage.key=value` to what the stage is given; the stage's name may itself contain dots."""
    parts = text.partition("=")[0].split(".")
    for length in range(len(parts) - 1, 0, -1):
        pattern = ".".join(parts[:length])
        names = [name for name in bodies if fnmatchcase(name, pattern)]
        for name in names:
            entry, scope, body = bodies[name]
            bodies[name] = entry, scope, strict_yaml.override(body, [text[len(pattern) + 1 :]])
        if names:
            return
    raise UserError(
        f"override {text!r}: write stage.section.key=value, or begin with vars, defaults or output_dir; "
        f"{parts[0]!r} is no stage{nearest(parts[0], [*RECIPE_KEYS, *bodies])}"
    )


def _stage(name: str, bodies: Mapping[str, Any], folder: Path, where: str) -> Stage:
    entry, scope, body = bodies[name]
    others = {stage: str(folder / stage) for stage in bodies if stage != name}
    folders = {**others, "output_dir": str(folder)}
    symbols = {name: f"<{name}>" for name in folders}
    used = set[str]()

    def lookup(key: str) -> Any:
        if key in others:
            used.add(key)
        return _at({**folders, **scope}, key)

    given = _substitute(body, lookup, where, [*scope, *folders])
    function = _substitute(entry.get("function"), partial(_at, scope), where, scope)
    patterns = _substitute(entry.get("after", []), partial(_at, scope), where, scope)
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{where}.after: a list of names or patterns of stages, got {patterns!r}")
    for pattern in patterns:
        used.update(_matching(pattern, list(others), f"{where}.after"))
    portable = _substitute(body, partial(_at, {**symbols, **scope}), where, [*scope, *folders])
    after = tuple(stage for stage in bodies if stage in used)
    return Stage(name, entry["task"], given, portable, function, after)


def _matching(pattern: str, names: Sequence[str], where: str) -> list[str]:
    matching = [name for name in names if fnmatchcase(name, pattern)]
    if not matching:
        raise UserError(f"{where}: no stage {pattern!r}{nearest(pattern, names)}")
    return matching


def _at(scope: Mapping[str, Any], name: str) -> Any:
    """The value of a name, or, as in `arm.objective`, of a key in a named mapping. Raises KeyError."""
    if name in scope:
        return scope[name]
    first, _, rest = name.partition(".")
    value = scope[first]
    for key in rest.split("."):
        if not isinstance(value, dict):
            raise KeyError(name)
        value = value[key]
    return value


def _substitute(value: Any, lookup: Callable[[str], Any], where: str, names: Iterable[str]) -> Any:
    """Replace every ${name} in `value`, the innermost first. One that is the whole text keeps its type."""
    if isinstance(value, dict):
        return {key: _substitute(child, lookup, f"{where}.{key}", names) for key, child in value.items()}
    if isinstance(value, list):
        return [_substitute(child, lookup, where, names) for child in value]
    for _ in range(MOST_SUBSTITUTIONS):
        match = REFERENCE.search(value) if isinstance(value, str) else None
        if match is None:
            return value
        try:
            new = lookup(match[1])
        except KeyError:
            near = nearest(match[1], names)
            raise UserError(f"{where}: {match[0]} is no stage or var{near}") from None
        if match[0] == value and not isinstance(new, str):
            return _substitute(new, lookup, where, names)
        if isinstance(new, dict | list):
            raise UserError(f"{where}: {match[0]} is no text or number, and cannot be a part of {value!r}")
        text = new if isinstance(new, str) else json.dumps(new)
        value = value[: match.start()] + text + value[match.end() :]
    raise UserError(f"{where}: {value!r:.80} refers to itself")


def _in_order(stages: Sequence[Stage], path: Path) -> Iterator[Stage]:
    """The stages, each after those it depends on; where that leaves a choice, in the file's order."""
    waiting, done = list(stages), set[str]()
    while waiting:
        stage = next((stage for stage in waiting if done.issuperset(stage.after)), None)
        if stage is None:
            names = ", ".join(stage.name for stage in waiting)
            raise UserError(f"{path}: these stages wait for each other or for one that does: {names}")
        yield stage
        waiting.remove(stage)
        done.add(stage.name)
