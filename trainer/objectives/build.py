"""An objective with its parameters, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from madpo.trainer.errors import nearest
from madpo.trainer.objectives.base import BatchState, EdgeLoss, Item, Need, Objective, Outcome, Params
from madpo.trainer.objectives.scores import Scored, Scores

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
    """An objective with its parameters.

    Call it with `EdgeScores`, `SequenceScores` or `Scored`, as `entry.view` says: one loss per item.
    """

    entry: Objective
    params: Params

    @property
    def loss_type(self) -> str:
        return self.entry.name

    @property
    def item(self) -> Item:
        """The unit that the loss is averaged over."""
        return self.entry.item

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs beside the log-probs: reference, margins, lengths, labels, tokens, batch, ..."""
        return self.entry.needs

    @property
    def needs_reference(self) -> bool:
        return self.entry.needs_reference

    @property
    def needs_margin(self) -> bool:
        return self.entry.needs_margin

    @property
    def needs_batch(self) -> bool:
        """Whether its losses look at all items of the step, of all ranks, at once."""
        return self.entry.needs_batch

    @property
    def is_reward_model(self) -> bool:
        return self.entry.is_reward_model

    @property
    def supervised(self) -> bool:
        return self.entry.supervised

    @property
    def beta(self) -> float:
        """The factor between log-ratios and rewards in the metrics; 1 where the objective has none."""
        return getattr(self.params, "beta", 1.0)

    @property
    def weight(self) -> Callable[[Tensor], Tensor] | None:
        """Margins (E,) -> the weights (E,) of the pairs, where the loss is such a product."""
        weight = self.entry.weight
        return None if weight is None else lambda margins: weight(margins, self.params)

    def epilogue(
        self,
        margins: Tensor,  # (E,)
    ) -> EdgeLoss | None:
        """The losses as data for the kernels to form; None where autograd differentiates the function."""
        return None if self.entry.epilogue is None else self.entry.epilogue(margins, self.params)

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

    def of_groups(self, scored: Scored) -> Outcome:
        """The losses of whole groups; not for an objective that needs the batch."""
        return self.entry(scored, self.params)


FIELDS = {
    Need.REFERENCE: ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_token_logps"),
    Need.LENGTHS: ("chosen_lengths", "rejected_lengths", "lengths"),
    Need.MARGINS: ("margins",),
    Need.LABELS: ("labels",),
    Need.DISTRIBUTIONS: ("log_collisions",),
    Need.KL: ("kl",),
}
"""Where the scores hold what an objective needs; of these names, each kind of scores has some."""


def bind(params: Params) -> BoundObjective:
    """The objective that these parameters are of."""
    from madpo.trainer.objectives.registry import OBJECTIVES

    return BoundObjective(OBJECTIVES[params.model_fields["loss_type"].default].of(params), params)


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
    return bind(params)
