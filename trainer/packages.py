"""Packages that are not installed with madpo itself: how to install one into the Python that runs."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


def install(package: str) -> str:
    """The command that installs a package, or extras of madpo as in `madpo[peft]`, into this Python.

    `pip` alone where it is this Python's own; the shell may know another one, or none.
    """
    name = f"'{package}'" if "[" in package else package
    pip = shutil.which("pip")
    if pip is not None and Path(pip).parent == Path(sys.executable).parent:
        return f"pip install {name}"
    if find_spec("pip") is None:  # an environment that uv has made
        return f"uv pip install --python {sys.executable} {name}"
    return f"{sys.executable} -m pip install {name}"
