"""What an objective is: a pure function of small vectors, and its needs, declared as data.

An objective sees the log-probabilities of whole groups (a prompt with its completions) and returns one loss
per *item*: an edge, a sequence or a token, as it declares. The loss of an optimiser step is the mean over
the items of the global batch. An objective of edges takes `EdgeScores`, one of sequences `SequenceScores`,
one that looks at tokens `Scored`.

Most objectives see one micro-batch at a time. A global-batch objective, which needs "batch", sees all items
of the step, of all ranks and in the step's order. It may also take a `BatchState`, and keep numbers for the
next step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import wraps
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
        """Why this loss cannot be computed with the margins (E,) of a data set, and what to do; else None."""
        return None

    @classmethod
    def keys(cls) -> set[str]:
        """All names under which parameters can be given, aliases among them."""
        return {key for name in cls.model_fields for key in (name, *cls.aliases(name))}

    @classmethod
    def aliases(cls, name: str) -> list[str]:
        """The names under which a parameter is given in place of its own."""
        alias = cls.model_fields[name].validation_alias
        return [str(choice) for choice in alias.choices] if isinstance(alias, AliasChoices) else []

    @property
    def quantiles(self) -> dict[str, float]:
        """Parameter -> q, for the parameters that are given as `quantile:q`."""
        quantiles = {name: quantile_of(getattr(self, name)) for name in type(self).model_fields}
        return {name: q for name, q in quantiles.items() if q is not None}

    def resolve(self, values: np.ndarray) -> Self:
        """A copy with every quantile replaced by its number: that quantile of the values (N,).

        `values` are what the parameters are compared with. Raises ValueError if a number is out of range.
        """
        numbers = {name: float(np.quantile(self.scale_of(values), q)) for name, q in self.quantiles.items()}
        return type(self).model_validate({**self.model_dump(by_alias=True), **numbers})

    def scale_of(self, values: np.ndarray) -> np.ndarray:
        """Transform the values as this loss does before it compares them with its parameters."""
        return values


@dataclass(frozen=True)
class BatchState:
    """What a global-batch objective knows besides the scores of the step; equal on all ranks."""

    memory: Mapping[str, list[float]] = field(default_factory=dict)  # from the last step; empty at first
    seed: tuple[int, int] = (0, 0)  # the run's seed, and the step's number


@dataclass(frozen=True)
class Outcome:
    """What an objective returns."""

    losses: Tensor  # (items,)
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> (items,), detached, for the log
    memory: dict[str, list[float]] = field(default_factory=dict)  # for the next step's BatchState

    def weighted(
        self,
        weights: Tensor | None,  # (items,)
    ) -> Outcome:
        """The outcome with the losses times these factors, in the losses' dtype."""
        if weights is None:
            return self
        return replace(self, losses=self.losses * weights.to(self.losses.dtype))


class Need(StrEnum):
    """What an objective needs besides the log-probs of its completions."""

    REFERENCE = "reference"
    """Log-probs under the reference model."""
    MARGINS = "margins"
    """Margins of the pairs."""
    LENGTHS = "lengths"
    """Lengths of the completions."""
    LABELS = "labels"
    """Which completions are desirable."""
    MISMATCHED = "mismatched"
    """Completions that belong to another prompt (KTO's estimate of the KL)."""
    SCORES = "scores"
    """A reward model's scores instead of log-probs."""
    TOKENS = "tokens"
    """Log-probs of single tokens: the function takes `Scored`."""
    DISTRIBUTIONS = "distributions"
    """`log_collisions` of `Scored`, from a slower head that looks at whole distributions."""
    KL = "kl"
    """`kl` of `Scored`, which takes the reference's logits; needs `distributions` too."""
    BATCH = "batch"
    """All items of the step at once, of all ranks."""


def _needs(names: Iterable[str]) -> frozenset[Need]:
    """The members of `Need` by name. Raises AssertionError for an unknown name."""
    unknown = sorted(set(names) - set(Need))
    assert not unknown, f"unknown needs {', '.join(unknown)}; choose from {', '.join(Need)}"
    return frozenset(Need(name) for name in names)


Epilogue = Callable[[Tensor, Any], EdgeLoss]
"""(margins (E,), params) -> the objective's losses as data, for the kernels to form."""


EdgeWeight = Callable[[Tensor, Any], Tensor]
"""(margins (E,), params) -> weights (E,), 0 or more.

For an objective whose loss is such a weight times something that does not depend on the margin.
"""


@dataclass(frozen=True)
class Objective:
    """One entry of the registry: the function and its declared needs."""

    function: Callable[[Any, Any, BatchState], Outcome]
    params: type[Params]
    item: Item = Item.EDGE
    needs: frozenset[Need] = frozenset()
    needs_of: Callable[[Any], Iterable[str]] | None = None  # set where the needs depend on the parameters
    epilogue: Epilogue | None = None  # None: autograd differentiates the function
    weight: EdgeWeight | None = None  # None: the loss is no such product

    def __call__(self, scored: Scored, params: Params) -> Outcome:
        """The losses of whole groups, with the data's weights; not for a global-batch objective."""
        assert not self.needs_batch
        scores: Scores = scored
        if self.view is EdgeScores:
            scores = scored.edges
        elif self.view is SequenceScores:
            scores = scored.sequences
        outcome = self.function(scores, params, BatchState())
        return outcome.weighted(self._item_weights(scored))

    def _item_weights(self, scored: Scored) -> Tensor | None:
        """(items,) the data's factors on the losses of the items."""
        if self.item is Item.EDGE:
            return scored.edge_weights
        weights = scored.completion_weights
        if weights is None or self.item is Item.SEQUENCE:
            return weights
        return weights.repeat_interleave(scored.lengths, output_size=len(scored.token_logps))

    @property
    def view(self) -> type[Scores]:
        """The kind of scores that the function takes."""
        if self.item is Item.TOKEN or self.needs & {Need.TOKENS, Need.DISTRIBUTIONS}:
            return Scored
        return EdgeScores if self.item is Item.EDGE else SequenceScores

    @property
    def name(self) -> str:
        return self.params.model_fields["loss_type"].default

    @property
    def equation(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    def of(self, params: Params) -> Objective:
        """The objective with its needs under these parameters."""
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
        """Whether it trains a reward model, on scores instead of log-probs."""
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

    The function takes (scores, params), or (scores, params, BatchState), and returns an Outcome or just the
    losses. `needs` are members of `Need` or their values, or a function of the parameters. Raises
    AssertionError for an unknown need.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        wants_state = len(inspect.signature(function).parameters) == 3

        @wraps(function)
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
