"""Call one Python function of a recipe, in a process of its own.

python -m madpo.launch.recipes.call REQUEST.yaml
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import Any

from madpo.launch.lifeline import die_with_launcher
from madpo.trainer import user_function
from madpo.trainer.config import strict_yaml
from madpo.trainer.errors import UserError, nearest


def check(function: str, text: str, arguments: dict[str, Any]) -> None:
    """Raise UserError unless the module's text defines the function with these arguments and `output`.

    A function that the module imports or assigns cannot be checked and is accepted.
    """
    module, _, name = function.rpartition(":")
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{module}:{error.lineno}: {error.msg}") from None
    defined = {node.name: node.args for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name not in defined:
        if not re.search(rf"\b{name}\b", text):
            raise UserError(f"{module} has no function {name}{nearest(name, defined)}")
        return
    signature = defined[name]
    positional = [argument.arg for argument in (*signature.posonlyargs, *signature.args)]
    allowed = [*positional, *(argument.arg for argument in signature.kwonlyargs)]
    needed = positional[: len(positional) - len(signature.defaults)]
    by_keyword = zip(signature.kwonlyargs, signature.kw_defaults, strict=True)
    needed += [argument.arg for argument, default in by_keyword if default is None]
    given = ("output", *arguments)
    for key in given:
        if key not in allowed and signature.kwarg is None:
            raise UserError(f"{name} takes no argument {key}{nearest(key, allowed)}")
    if missing := [key for key in needed if key not in given]:
        raise UserError(f"{name} needs the argument {', '.join(missing)}")


def main() -> int:
    """Call the function that a request file names; returns the exit status."""
    die_with_launcher()
    (path,) = sys.argv[1:]
    request = strict_yaml.read(path)
    try:
        user_function.load(request["function"])(**request["arguments"], output=Path(request["output"]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
