"""An objective with its parameters, by name."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from madpo.trainer.objectives.base import EdgeScores, Item, Objective, Params, Scored

ALIASES = {"sigmoid": "dpo"}
"""Names of other libraries."""


@dataclass(frozen=True)
class BoundObjective:
    """Call it with `EdgeScores` (pairs) or `Scored` (tokens) for one loss per item."""

    entry: Objective
    params: Params

    @property
    def needs(self) -> frozenset[str]:
        """Which of "reference", "margins" and "lengths" it needs beside the log-probs."""
        return self.entry.needs

    def __call__(self, scores: EdgeScores | Scored) -> Tensor:
        """(E,) or (M,) losses, unreduced. Raises ValueError if something it needs is missing."""
        if (self.entry.item is Item.EDGE) != isinstance(scores, EdgeScores):
            wanted = "EdgeScores" if self.entry.item is Item.EDGE else "Scored"
            raise ValueError(f"{self.entry.name} takes {wanted}, got {type(scores).__name__}")
        for need in sorted(self.needs):
            for name in FIELDS[need] if isinstance(scores, EdgeScores) else ():
                if getattr(scores, name) is None:
                    raise ValueError(f"{self.entry.name} needs {name}")
        return self.entry.function(scores, self.params).losses


FIELDS = {
    "reference": ("ref_chosen_logps", "ref_rejected_logps"),
    "lengths": ("chosen_lengths", "rejected_lengths"),
    "margins": ("margins",),
}


def build(name: str, **parameters: Any) -> BoundObjective:
    """The objective `name` with these parameters, defaults for the rest.

    Raises ValueError for an unknown name, an unknown parameter or one out of its range.
    """
    from madpo.trainer.objectives.registry import OBJECTIVES

    name = ALIASES.get(name, name)
    if name not in OBJECTIVES:
        near = get_close_matches(name, OBJECTIVES, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; one of {', '.join(sorted(OBJECTIVES))}"
        raise ValueError(f"unknown objective {name!r}{hint}")
    entry = OBJECTIVES[name]
    try:
        params = entry.params.model_validate(parameters)
        return BoundObjective(entry.of(params), params)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']} (got {problem['input']!r})"
            for problem in error.errors()
        ]
        raise ValueError(f"{name}: {'; '.join(problems)}") from None
