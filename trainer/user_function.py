"""A function that a user names in a config or a recipe: `module:name` or `path/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from madpo.trainer.errors import UserError
from madpo.trainer.files import check_path


def find(function: str, beside: Path) -> tuple[str, str]:
    """Look up the module of a function without importing it; a file is relative to `beside`.

    Returns the function in the same notation, with the file's absolute path, and the module's source
    text. Raises UserError if there is no such module.
    """
    module, _, name = function.rpartition(":")
    if not module or not name.isidentifier():
        raise UserError(f"function {function!r}: write module:name or path/file.py:name")
    path = file_of(function, beside)
    if path is None:
        raise UserError(f"function {function!r}: there is no {module}")
    return f"{path if module.endswith('.py') else module}:{name}", path.read_text(encoding="utf-8")


def file_of(function: str, beside: Path) -> Path | None:
    """The file of the function's module, None if there is none; arguments as in `find`."""
    module = function.rpartition(":")[0]
    if module.endswith(".py"):
        path = beside / Path(module).expanduser()
        check_path(path)
        path = path.resolve()
        return path if path.is_file() else None
    _search_working_directory()
    spec = _spec_of(module)
    return Path(spec.origin) if spec and spec.origin and Path(spec.origin).is_file() else None


def _spec_of(module: str) -> ModuleSpec | None:
    """Where a module is, without running anything: `importlib.util.find_spec` imports the packages that it
    is in. None if there is none."""
    name, *rest = module.split(".")
    if not all(part.isidentifier() for part in (name, *rest)):
        return None
    spec = next((spec for finder in sys.meta_path if (spec := finder.find_spec(name, None))), None)
    for part in rest:
        name = f"{name}.{part}"
        folders = (spec and spec.submodule_search_locations) or []
        finders = [finder for folder in folders if (finder := pkgutil.get_importer(folder))]
        found = [spec for finder in finders if (spec := finder.find_spec(name, None))]
        # A folder without `__init__.py` counts if nothing else has the name.
        spec = next((spec for spec in found if spec.loader), None) or next(iter(found), None)
    return spec


def load(function: str) -> Any:
    """Import the function's module and return the function; a file is relative to the working directory.

    Raises ImportError, FileNotFoundError or AttributeError if there is none, and whatever its module
    raises.
    """
    module, _, name = function.rpartition(":")
    if not module.endswith(".py"):
        _search_working_directory()
        return getattr(importlib.import_module(module), name)
    path = Path(module).expanduser().resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"user_function_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # where dataclasses look for it
    spec.loader.exec_module(loaded)
    return getattr(loaded, name)


def _search_working_directory() -> None:
    """Make modules in the working directory importable in every process, however it was started."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
