"""Preference optimisation from Python: `madpo.train`, `madpo.evaluate` and `madpo.generate`.

This is the `__init__` of the package `madpo` itself. Its names are loaded at their first use, so that
`import madpo.kernels` needs no more than the kernels do.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from madpo.launch.api import Config, TrainResult, UserError, evaluate, generate, load_config, train

__all__ = ["Config", "TrainResult", "UserError", "evaluate", "generate", "load_config", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("madpo.launch.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
