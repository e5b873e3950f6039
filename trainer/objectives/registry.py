"""All objectives by `loss_type`: those in this folder, and those that installed packages announce.

To add one here, write its file. To add one from another package, decorate it with `base.objective` there
and announce its module as an entry point of the group `madpo.objectives`.
"""

from __future__ import annotations

import pkgutil
from functools import reduce
from importlib import import_module
from importlib.metadata import entry_points
from operator import or_
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from madpo.trainer.objectives.base import OBJECTIVES

for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
    if module.name != "registry":
        import_module(f"madpo.trainer.objectives.{module.name}")
for entry_point in entry_points(group="madpo.objectives"):
    entry_point.load()
for name in sorted(OBJECTIVES):
    OBJECTIVES[name] = OBJECTIVES.pop(name)

ObjectiveParams: Any = Annotated[
    reduce(or_, (entry.params for entry in OBJECTIVES.values())),
    Field(discriminator="loss_type"),
]
"""The type of the config's `objective` block: one of the parameter classes, chosen by `loss_type`."""
