"""An objective with its parameters, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from madpo.trainer.errors import nearest
from madpo.trainer.objectives.base import BatchState, Objective, Outcome, Params, Scores

ALIASES = {"sigmoid": "dpo", "sft": "chosen_nll"}
"""Names of other libraries."""


def as_one_objective(block: dict[str, Any]) -> dict[str, Any]:
    """An `objective` block in TRL's spelling as ours: other names, and a list of losses with their weights.

    A parameter beside a list goes to every loss that has it. Raises ValueError for one that none has.
    """
    from madpo.trainer.objectives.registry import OBJECTIVES

    kinds = block.get("loss_type")
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        return {**block, "loss_type": ALIASES.get(kinds, kinds)} if isinstance(kinds, str) else block
    parameters = {key: value for key, value in block.items() if key not in ("loss_type", "loss_weights")}
    terms, taken = [], set[str]()
    for kind in (ALIASES.get(kind, kind) for kind in kinds):
        known = OBJECTIVES[kind].params.keys() if kind in OBJECTIVES else set[str]()
        terms.append({"loss_type": kind, **{k: v for k, v in parameters.items() if k in known}})
        taken |= known
    if unknown := parameters.keys() - taken:
        names = ", ".join(map(str, kinds))
        raise ValueError(f"{', '.join(sorted(unknown))}: none of {names} has this parameter")
    weights = block.get("loss_weights", [1.0] * len(kinds))
    return {"loss_type": "weighted_sum", "terms": terms, "loss_weights": weights}


@dataclass(frozen=True)
class BoundObjective:
    """Call it with `EdgeScores`, `SequenceScores` or `Scored`, as `entry.view` says: one loss per item."""

    entry: Objective
    params: Params

    @property
    def needs(self) -> frozenset[str]:
        """What it needs beside the log-probs: reference, margins, lengths, labels, tokens, batch, ..."""
        return self.entry.needs

    def __call__(self, scores: Scores, state: BatchState | None = None) -> Tensor:
        """(items,) losses, unreduced. Raises ValueError if something it needs is missing."""
        return self.outcome(scores, state).losses

    def outcome(self, scores: Scores, state: BatchState | None = None) -> Outcome:
        """The losses, what goes into the log, and what the next call should find in its `state`."""
        view = self.entry.view
        if not isinstance(scores, view):
            raise ValueError(f"{self.entry.name} takes {view.__name__}, got {type(scores).__name__}")
        for need in sorted(self.needs & FIELDS.keys()):
            for name in FIELDS[need]:
                if getattr(scores, name, scores) is None:
                    raise ValueError(f"{self.entry.name} needs {name}")
        return self.entry.function(scores, self.params, state or BatchState())


FIELDS = {
    "reference": ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_token_logps"),
    "lengths": ("chosen_lengths", "rejected_lengths", "lengths"),
    "margins": ("margins",),
    "labels": ("labels",),
    "distributions": ("log_collisions",),
    "kl": ("kl",),
}
"""Where the scores hold what an objective needs; of these names, each kind of scores has some."""


def build(name: str, /, **parameters: Any) -> BoundObjective:
    """The objective `name` with these parameters, defaults for the rest.

    Raises ValueError for an unknown name, an unknown parameter or one out of its range.
    """
    from madpo.trainer.objectives.registry import OBJECTIVES

    name = ALIASES.get(name, name)
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}{nearest(name, OBJECTIVES)}")
    entry = OBJECTIVES[name]
    try:
        params = entry.params.model_validate(parameters)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']} (got {problem['input']!r})"
            for problem in error.errors()
        ]
        raise ValueError(f"{name}: {'; '.join(problems)}") from None
    return BoundObjective(entry.of(params), params)
