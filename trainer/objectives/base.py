"""What an objective is: a pure function of small vectors, and what it needs, declared as data.

An objective sees the log-probabilities of whole groups (a prompt with its completions) and returns
one loss per *item*. What an item is, an edge, a sequence or a token, is declared too: the loss of an
optimiser step is the mean over the items of the global batch. An objective of edges sees `EdgeScores`,
one of sequences `SequenceScores`, one that reads tokens `Scored`.

Most objectives see the groups of a micro-batch. One that needs the "batch" sees all items of the step, of
all ranks and in the step's order; it may take a `BatchState` too and keep numbers for the next step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

import numpy as np
from pydantic import AliasChoices, BaseModel, ConfigDict
from torch import Tensor

from madpo.kernels.edge_loss import EdgeLoss, MarginWeight
from madpo.trainer.objectives.fields import quantile_of
from madpo.trainer.objectives.scores import EdgeScores, Scored, Scores, SequenceScores, segment_sum

__all__ = [
    "BatchState",
    "EdgeLoss",
    "EdgeScores",
    "Item",
    "MarginWeight",
    "Need",
    "Objective",
    "Outcome",
    "Params",
    "Scored",
    "SequenceScores",
    "objective",
    "segment_sum",
]


class Item(StrEnum):
    """The unit that the loss is averaged over."""

    EDGE = "edge"
    SEQUENCE = "sequence"
    TOKEN = "token"


class Params(BaseModel):
    """Base of every objective's parameters: strict, immutable, finite. Each adds its `loss_type`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def problem_with(self, margins: np.ndarray) -> str | None:
        """What in the margins (E,) of a data set this loss cannot be formed with, and what to do about it."""
        return None

    @classmethod
    def keys(cls) -> set[str]:
        """All names under which parameters can be given."""
        aliases = (parameter.validation_alias for parameter in cls.model_fields.values())
        choices = (choice for alias in aliases if isinstance(alias, AliasChoices) for choice in alias.choices)
        return {*cls.model_fields, *map(str, choices)}

    @property
    def quantiles(self) -> dict[str, float]:
        """Parameters that are given as a quantile, with that quantile."""
        found = {name: quantile_of(getattr(self, name)) for name in type(self).model_fields}
        return {name: q for name, q in found.items() if q is not None}

    def resolve(self, values: np.ndarray) -> Self:
        """The same with numbers for quantiles, of the values (N,) that the parameters are compared with.

        Raises ValueError where a quantile is not allowed as a number.
        """
        numbers = {name: float(np.quantile(self.scale_of(values), q)) for name, q in self.quantiles.items()}
        return type(self).model_validate({**self.model_dump(by_alias=True), **numbers})

    def scale_of(self, values: np.ndarray) -> np.ndarray:
        """The values as the parameters are compared with them."""
        return values


@dataclass(frozen=True)
class BatchState:
    """What an objective of the whole batch knows beside the scores of the step; alike on all ranks."""

    memory: Mapping[str, list[float]] = field(default_factory=dict)  # what it kept; empty at first
    seed: tuple[int, int] = (0, 0)  # of the run, and the step


@dataclass(frozen=True)
class Outcome:
    """What an objective returns."""

    losses: Tensor  # (items,)
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> (items,), detached, for the log
    memory: dict[str, list[float]] = field(default_factory=dict)  # to find in the next step's BatchState


class Need(StrEnum):
    """What an objective needs beside the log-probs of its completions."""

    REFERENCE = "reference"
    """Log-probs under the reference."""
    MARGINS = "margins"
    """Margins of the pairs."""
    LENGTHS = "lengths"
    """Lengths of the completions."""
    LABELS = "labels"
    """Which completions are desirable."""
    MISMATCHED = "mismatched"
    """Completions that were written for another prompt."""
    SCORES = "scores"
    """A reward model's scores in place of log-probs."""
    TOKENS = "tokens"
    """Log-probs of single tokens: the function takes `Scored`."""
    DISTRIBUTIONS = "distributions"
    """`log_collisions` of `Scored`, and `kl` where the reference is at hand, from a slower head."""
    KL = "kl"
    """`kl` of `Scored`, which the reference's log-probs do not tell; needs `distributions`, too."""
    BATCH = "batch"
    """All items of the step at once."""


def _needs(names: Iterable[str]) -> frozenset[Need]:
    """Raises AssertionError for a name that is no need."""
    unknown = sorted(set(names) - set(Need))
    assert not unknown, f"unknown needs {', '.join(unknown)}; choose from {', '.join(Need)}"
    return frozenset(Need(name) for name in names)


Epilogue = Callable[[Tensor, Any], EdgeLoss]
"""(margins (E,), params) -> the same losses as data, for the kernels to form."""


EdgeWeight = Callable[[Tensor, Any], Tensor]
"""(margins (E,), params) -> weights (E,), not negative, where an edge's loss is its weight times something
that does not depend on the margin. `EdgeScores.weights` come in their place."""


@dataclass(frozen=True)
class Objective:
    """One entry of the registry: the function and its declared needs."""

    function: Callable[[Any, Any, BatchState], Outcome]
    params: type[Params]
    item: Item = Item.EDGE
    needs: frozenset[Need] = frozenset()
    needs_of: Callable[[Any], Iterable[str]] | None = None  # where they depend on the parameters
    epilogue: Epilogue | None = None  # None: by autograd
    weight: EdgeWeight | None = None  # None: the loss is no such product

    def __call__(self, scored: Scored, params: Params) -> Outcome:
        """The losses of some whole groups; not for an objective that needs the batch."""
        assert not self.needs_batch
        views = {EdgeScores: lambda: scored.edges, SequenceScores: lambda: scored.sequences}
        return self.function(views.get(self.view, lambda: scored)(), params, BatchState())

    @property
    def view(self) -> type[Scores]:
        """What the function takes."""
        if self.item is Item.TOKEN or self.needs & {Need.TOKENS, Need.DISTRIBUTIONS}:
            return Scored
        return EdgeScores if self.item is Item.EDGE else SequenceScores

    @property
    def name(self) -> str:
        return self.params.model_fields["loss_type"].default

    def of(self, params: Params) -> Objective:
        """The objective with the needs that it has under these parameters."""
        return self if self.needs_of is None else replace(self, needs=_needs(self.needs_of(params)))

    @property
    def needs_reference(self) -> bool:
        return Need.REFERENCE in self.needs

    @property
    def needs_margin(self) -> bool:
        return Need.MARGINS in self.needs

    @property
    def needs_batch(self) -> bool:
        return Need.BATCH in self.needs

    @property
    def is_reward_model(self) -> bool:
        """Whether it trains a reward model, on scores in place of log-probs."""
        return Need.SCORES in self.needs

    @property
    def supervised(self) -> bool:
        """Whether it imitates one completion per prompt."""
        return self.item is Item.TOKEN


OBJECTIVES: dict[str, Objective] = {}
"""All objectives by `loss_type`; registry.py fills it."""


def objective(
    params: type[Params],
    needs: Iterable[str] | Callable[[Any], Iterable[str]] = (),
    item: Item = Item.EDGE,
    epilogue: Epilogue | None = None,
    weight: EdgeWeight | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function below under the `loss_type` of its parameters.

    It takes (scores, params), and as a third argument a `BatchState` if it wants it, and returns an
    Outcome or just the losses. `needs` are members of `Need` or their values. Raises AssertionError for
    a name that is none.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        wants_state = len(inspect.signature(function).parameters) == 3

        def outcome(scores: Scores, settings: Params, state: BatchState) -> Outcome:
            result = function(scores, settings, *((state,) if wants_state else ()))
            return result if isinstance(result, Outcome) else Outcome(result)

        if callable(needs):
            entry = Objective(outcome, params, item, needs_of=needs, epilogue=epilogue, weight=weight)
        else:
            entry = Objective(outcome, params, item, _needs(needs), epilogue=epilogue, weight=weight)
        alone = entry.needs & {Need.TOKENS, Need.DISTRIBUTIONS, Need.SCORES}
        assert not (entry.needs_batch and alone), f"{entry.name}: {alone} of a batch are not gathered"
        assert weight is None or (item is Item.EDGE and not entry.needs_batch), f"{entry.name}: whose weight?"
        assert entry.name not in OBJECTIVES, f"{entry.name} is registered twice"
        OBJECTIVES[entry.name] = entry
        return function

    return register
