"""An objective with its parameters, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from madpo.trainer.errors import nearest
from madpo.trainer.field_words import problem_of
from madpo.trainer.objectives.base import BatchState, EdgeLoss, Item, Need, Objective, Outcome, Params
from madpo.trainer.objectives.scores import Scored, Scores

ALIASES = {"sigmoid": "dpo", "sft": "chosen_nll"}
"""Names in other libraries -> ours."""


def as_one_objective(block: dict[str, Any]) -> dict[str, Any]:
    """Translate an `objective` block from TRL's spelling: its names, and a list of losses with weights.

    A list becomes a `weighted_sum`; a parameter beside it goes to every loss that has one of that name.
    Raises ValueError for a parameter that no loss has.
    """
    from madpo.trainer.objectives.registry import OBJECTIVES

    kinds = block.get("loss_type")
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        return {**block, "loss_type": ALIASES.get(kinds, kinds)} if isinstance(kinds, str) else block
    parameters = {key: value for key, value in block.items() if key not in ("loss_type", "loss_weights")}
    terms, allowed = [], set[str]()
    for kind in (ALIASES.get(kind, kind) for kind in kinds):
        own = OBJECTIVES[kind].params.keys() if kind in OBJECTIVES else set[str]()
        terms.append({"loss_type": kind, **{k: v for k, v in parameters.items() if k in own}})
        allowed |= own
    if unknown := parameters.keys() - allowed:
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
        """What it needs besides log-probs: reference, margins, lengths, labels, tokens, batch, ..."""
        return self.entry.needs

    @property
    def needs_reference(self) -> bool:
        return self.entry.needs_reference

    @property
    def needs_margin(self) -> bool:
        return self.entry.needs_margin

    @property
    def needs_batch(self) -> bool:
        """Whether it is a global-batch objective: its losses look at all items of the step at once."""
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
        """Margins (E,) -> weights (E,) of the pairs; None where the loss has no such factor."""
        weight = self.entry.weight
        return None if weight is None else lambda margins: weight(margins, self.params)

    def epilogue(
        self,
        margins: Tensor,  # (E,)
    ) -> EdgeLoss | None:
        """The losses as data for the kernels to form; None if autograd differentiates the function."""
        return None if self.entry.epilogue is None else self.entry.epilogue(margins, self.params)

    def __call__(self, scores: Scores, state: BatchState | None = None) -> Tensor:
        """(items,) losses, unreduced. Raises ValueError if something it needs is missing."""
        return self.outcome(scores, state).losses

    def outcome(self, scores: Scores, state: BatchState | None = None) -> Outcome:
        """The losses, values for the log, and memory for the next step's `state`."""
        view = self.entry.view
        if not isinstance(scores, view):
            raise ValueError(f"{self.entry.name} takes {view.__name__}, got {type(scores).__name__}")
        for need in sorted(self.needs & FIELDS.keys()):
            for name in FIELDS[need]:
                if getattr(scores, name, scores) is None:
                    raise ValueError(f"{self.entry.name} needs {name}")
        return self.entry.function(scores, self.params, state or BatchState())

    def of_groups(self, scored: Scored) -> Outcome:
        """The losses of whole groups, with the data's weights; not for a global-batch objective."""
        return self.entry(scored, self.params)


FIELDS = {
    Need.REFERENCE: ("ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_token_logps"),
    Need.LENGTHS: ("chosen_lengths", "rejected_lengths", "lengths"),
    Need.MARGINS: ("margins",),
    Need.LABELS: ("labels",),
    Need.DISTRIBUTIONS: ("log_collisions",),
    Need.KL: ("kl",),
}
"""Need -> the fields of scores that hold it; no kind of scores has all of them."""


def bind(params: Params) -> BoundObjective:
    """The objective that has these parameters."""
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
        raise ValueError(f"{name}: {'; '.join(_problems(error, entry.params))}") from None
    return bind(params)


def _problems(error: ValidationError, params: type[Params]) -> Iterator[str]:
    """What is wrong with each parameter."""
    fields = params.model_fields
    names = {str(alias): name for name in fields for alias in params.aliases(name)}
    for item in error.errors():
        name = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "extra_forbidden":
            yield f"{name}: unknown parameter{nearest(name, fields.keys() - {'loss_type'})}"
        else:
            yield f"{name}: {problem_of(item, fields.get(names.get(name, name)))}".removeprefix(": ")
