"""One Python function of a recipe, in a process of its own: python -m madpo.launch.call REQUEST.yaml"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

from madpo.launch.lifeline import die_with_launcher
from madpo.trainer import strict_yaml
from madpo.trainer.errors import EXIT_USAGE, UserError


def find(function: str, beside: Path) -> tuple[str, str]:
    """`module:name` or `file.py:name`, a file relative to `beside` -> (the same, with the file's whole
    path, and the text of its module), without importing it. Raises ValueError if there is none."""
    module, _, name = function.rpartition(":")
    if not module or not name.isidentifier():
        raise UserError(f"function {function!r}: write module:name or path/file.py:name")
    path = file_of(function, beside)
    if path is None:
        raise UserError(f"function {function!r}: there is no {module}")
    return f"{path if module.endswith('.py') else module}:{name}", path.read_text(encoding="utf-8")


def file_of(function: str, beside: Path) -> Path | None:
    """The file of the function's module, if there is one; see `find`."""
    module = function.rpartition(":")[0]
    if module.endswith(".py"):
        path = (beside / Path(module).expanduser()).resolve()
        return path if path.is_file() else None
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # as in the process that calls it
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def check(function: str, text: str, arguments: dict[str, Any]) -> None:
    """Raise ValueError unless the module's text has the function, and it takes these arguments and
    `output`. A function that the module imports or makes is taken on trust."""
    module, _, name = function.rpartition(":")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{module}:{error.lineno}: {error.msg}") from None
    defined = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in defined:
        if not re.search(rf"\b{name}\b", text):
            raise UserError(f"{module} has no function {name}{strict_yaml.nearest(name, defined)}")
        return
    takes = defined[name]
    positional = [argument.arg for argument in (*takes.posonlyargs, *takes.args)]
    known = [*positional, *(argument.arg for argument in takes.kwonlyargs)]
    needed = positional[: len(positional) - len(takes.defaults)]
    needed += [a.arg for a, value in zip(takes.kwonlyargs, takes.kw_defaults, strict=True) if value is None]
    given = ("output", *arguments)
    for key in given:
        if key not in known and takes.kwarg is None:
            raise UserError(f"{name} takes no argument {key}{strict_yaml.nearest(key, known)}")
    if missing := [key for key in needed if key not in given]:
        raise UserError(f"{name} needs the argument {', '.join(missing)}")


def load(function: str) -> Any:
    """The function that `find` has found."""
    module, _, name = function.rpartition(":")
    if not module.endswith(".py"):
        return getattr(importlib.import_module(module), name)
    spec = importlib.util.spec_from_file_location(f"recipe_{Path(module).stem}", module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # where dataclasses look for it
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


def main() -> int:
    """Call the function of a request file; returns the exit status."""
    die_with_launcher()
    (path,) = sys.argv[1:]
    request = strict_yaml.read(path)
    try:
        load(request["function"])(**request["arguments"], output=Path(request["output"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
