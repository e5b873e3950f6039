"""What an objective is: a pure function of small vectors, and what it needs, declared as data.

An objective sees the log-probabilities of whole groups (a prompt with its completions) and returns
one loss per *item*. What an item is, an edge, a sequence or a token, is declared too: the loss of an
optimiser step is the mean over the items of the global batch. An objective of edges sees `EdgeScores`,
one of sequences or tokens `Scored`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from madpo.kernels.edge_loss import EdgeLoss, MarginWeight

__all__ = [
    "EdgeLoss",
    "EdgeScores",
    "Item",
    "MarginWeight",
    "Objective",
    "Outcome",
    "Params",
    "Scored",
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


@dataclass(frozen=True)
class EdgeScores:
    """The scores of E edges; a chosen and a rejected completion each. What is not needed may be None."""

    chosen_logps: Tensor  # (E,) log pi(chosen | prompt), summed over tokens
    rejected_logps: Tensor  # (E,)
    ref_chosen_logps: Tensor | None = None  # (E,) the same under the reference
    ref_rejected_logps: Tensor | None = None  # (E,)
    chosen_lengths: Tensor | None = None  # (E,) completion tokens
    rejected_lengths: Tensor | None = None  # (E,)
    margins: Tensor | None = None  # (E,) score of the chosen minus score of the rejected

    @cached_property
    def chosen_logratios(self) -> Tensor:
        """(E,) a = log pi - log pi_ref of the chosen completion."""
        assert self.ref_chosen_logps is not None, "this objective declared no need of a reference"
        return self.chosen_logps - self.ref_chosen_logps

    @cached_property
    def rejected_logratios(self) -> Tensor:
        """(E,) b, of the rejected one."""
        assert self.ref_rejected_logps is not None, "this objective declared no need of a reference"
        return self.rejected_logps - self.ref_rejected_logps

    @cached_property
    def deltas(self) -> Tensor:
        """(E,) D = a - b: the implicit margin without beta."""
        return self.chosen_logratios - self.rejected_logratios

    @cached_property
    def chosen_means(self) -> Tensor:
        """(E,) u_w: log pi(chosen) per token."""
        return self.chosen_logps / self.counts[0]

    @cached_property
    def rejected_means(self) -> Tensor:
        """(E,) u_l"""
        return self.rejected_logps / self.counts[1]

    @cached_property
    def counts(self) -> tuple[Tensor, Tensor]:
        """Tokens of both completions in the dtype of the scores, 1 for an empty one; (E,) each."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        kind = self.chosen_logps.dtype
        return self.chosen_lengths.clamp(min=1).to(kind), self.rejected_lengths.clamp(min=1).to(kind)


@dataclass(frozen=True)
class Scored:
    """The scores of whole groups. S sequences (completions), E edges, M completion tokens."""

    token_logps: Tensor  # (M,) log pi(token | prefix), sequences one after another
    ref_token_logps: Tensor | None  # (M,) the same under the reference
    lengths: Tensor  # (S,) completion tokens
    winners: Tensor  # (E,) index into the S sequences
    losers: Tensor  # (E,)
    margins: Tensor  # (E,) score of the winner minus score of the loser

    @cached_property
    def logps(self) -> Tensor:
        """(S,) log pi(completion | prompt), summed over tokens in float64."""
        return segment_sum(self.token_logps, self.lengths)

    @cached_property
    def ref_logps(self) -> Tensor:
        """(S,) the same under the reference."""
        assert self.ref_token_logps is not None, "this objective declared no need of a reference"
        return segment_sum(self.ref_token_logps, self.lengths)

    @cached_property
    def logratios(self) -> Tensor:
        """(S,) log pi(y|x) - log pi_ref(y|x)."""
        return self.logps - self.ref_logps

    @cached_property
    def edges(self) -> EdgeScores:
        """The same, edge by edge."""
        won, lost, ref = self.winners, self.losers, self.ref_token_logps is not None
        return EdgeScores(
            self.logps[won],
            self.logps[lost],
            self.ref_logps[won] if ref else None,
            self.ref_logps[lost] if ref else None,
            self.lengths[won],
            self.lengths[lost],
            self.margins,
        )


@dataclass(frozen=True)
class Outcome:
    """What an objective returns."""

    losses: Tensor  # (items,)
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> (items,), detached, for the log


Epilogue = Callable[[Tensor, Any], EdgeLoss]
"""(margins (E,), params) -> the same losses as data, for the kernels to form."""


@dataclass(frozen=True)
class Objective:
    """One entry of the registry: the function and its declared needs."""

    function: Callable[..., Outcome]  # (EdgeScores or Scored, params) -> Outcome
    params: type[Params]
    item: Item = Item.EDGE
    needs: frozenset[str] = frozenset()  # of reference, margins, lengths
    needs_of: Callable[[Any], frozenset[str]] | None = None  # where they depend on the parameters
    epilogue: Epilogue | None = None  # None: by autograd

    def __call__(self, scored: Scored, params: Params) -> Outcome:
        return self.function(scored.edges if self.item is Item.EDGE else scored, params)

    @property
    def name(self) -> str:
        return self.params.model_fields["loss_type"].default

    def of(self, params: Params) -> Objective:
        """The objective with the needs that it has under these parameters."""
        return self if self.needs_of is None else replace(self, needs=self.needs_of(params))

    @property
    def needs_reference(self) -> bool:
        return "reference" in self.needs

    @property
    def needs_margin(self) -> bool:
        return "margins" in self.needs

    @property
    def supervised(self) -> bool:
        """Whether it looks at one completion per prompt and compares none."""
        return self.item is not Item.EDGE


OBJECTIVES: dict[str, Objective] = {}
"""All objectives by `loss_type`; registry.py fills it."""


def objective(
    params: type[Params],
    needs: Iterable[str] | Callable[[Any], frozenset[str]] = (),
    item: Item = Item.EDGE,
    epilogue: Epilogue | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function below under the `loss_type` of its parameters.

    It takes (EdgeScores, params), or (Scored, params) for sequences and tokens, and returns an Outcome
    or just the losses.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def outcome(scores: Any, settings: Params) -> Outcome:
            result = function(scores, settings)
            return result if isinstance(result, Outcome) else Outcome(result)

        if callable(needs):
            entry = Objective(outcome, params, item, needs_of=needs, epilogue=epilogue)
        else:
            entry = Objective(outcome, params, item, frozenset(needs), epilogue=epilogue)
        assert entry.name not in OBJECTIVES, f"{entry.name} is registered twice"
        OBJECTIVES[entry.name] = entry
        return function

    return register


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive runs in a fixed order, in float64: values (M,), lengths (S,) -> (S,).

    float64 because a log-ratio of two long sequences is a small difference of large sums, and the
    vectors here are short.
    """
    # unsafe=True skips a check of the lengths that would wait for the device.
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, initial=0.0, unsafe=True)
