"""A Python in which some packages are not installed, for subprocesses.

    python absent.py deepspeed,pydantic -m madpo.launch.cli bench --help
    python absent.py deepspeed,pydantic -c 'import madpo.kernels.logit_rows'

Finders do not find them, so that an import of one fails as it does where they are missing, and
`importlib.util.find_spec` and `importlib.metadata` know nothing of them.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any


class Without:
    """A finder of modules that does not see the packages."""

    def __init__(self, finder: Any, packages: frozenset[str]) -> None:
        self.finder, self.packages = finder, packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] in self.packages else self.finder.find_spec(name, path, target)

    def find_distributions(self, context: Any = None) -> Iterable[metadata.Distribution]:
        if not hasattr(self.finder, "find_distributions"):
            return []
        found = self.finder.find_distributions(context or metadata.DistributionFinder.Context())
        return [x for x in found if x.metadata["Name"].lower().replace("-", "_") not in self.packages]


def python_without(packages: Iterable[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the arguments of `python` in such a Python, on the CPU."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, __file__, ",".join(packages), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)


def main() -> None:
    _, packages, switch, what, *rest = sys.argv
    hidden = frozenset(packages.split(","))
    early = sorted({name.split(".")[0] for name in sys.modules} & hidden)
    assert not early, f"imported before anything was asked for: {early}"
    sys.meta_path[:] = [Without(finder, hidden) for finder in sys.meta_path]
    sys.argv = [what, *rest] if switch == "-m" else ["-c", *rest]
    if switch == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<absent>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
