"""All objectives by `loss_type`. To add one: write its file, then name the module here."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Annotated, Any

from pydantic import Field

from madpo.trainer.objectives import dpo, madpo, nll
from madpo.trainer.objectives.base import Objective

OBJECTIVES: dict[str, Objective] = {
    module.OBJECTIVE.params.model_fields["loss_type"].default: module.OBJECTIVE
    for module in (dpo, madpo, nll)
}

ObjectiveParams: Any = Annotated[
    reduce(or_, (objective.params for objective in OBJECTIVES.values())),
    Field(discriminator="loss_type"),
]
"""The type of the config's `objective` block: one of the parameter classes, chosen by `loss_type`."""
