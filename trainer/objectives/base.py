"""What an objective is: a pure function of small vectors, and what it needs, declared as data.

An objective sees the log-probabilities of whole groups (a prompt with its completions) and returns
one loss per *item*. What an item is, an edge, a sequence or a token, is declared too: the loss of an
optimiser step is the mean over the items of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from madpo.kernels.edge_loss import EdgeLoss, MarginWeight

__all__ = ["EdgeLoss", "Item", "MarginWeight", "Objective", "Outcome", "Params", "Scored", "segment_sum"]


class Item(StrEnum):
    """The unit that the loss is averaged over."""

    EDGE = "edge"
    SEQUENCE = "sequence"
    TOKEN = "token"


class Params(BaseModel):
    """Base of every objective's parameters: strict, immutable, finite. Each adds its `loss_type`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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
    def deltas(self) -> Tensor:
        """(E,) log-ratio of the winner minus log-ratio of the loser: the implicit margin without beta."""
        return self.logratios[self.winners] - self.logratios[self.losers]


@dataclass(frozen=True)
class Outcome:
    """What an objective returns."""

    losses: Tensor  # (items,)
    stats: dict[str, Tensor] = field(default_factory=dict)  # name -> (items,), detached, for the log


@dataclass(frozen=True)
class Objective:
    """One entry of the registry: the function and its declared needs."""

    function: Callable[..., Outcome]  # (scored, params) -> Outcome
    params: type[Params]
    item: Item = Item.EDGE
    needs_reference: bool = True
    needs_margin: bool = False
    epilogue: Callable[..., EdgeLoss] | None = None
    """(margins (E,), params) -> the same losses as data, for the kernels to form; None: by autograd."""

    @property
    def supervised(self) -> bool:
        """Whether it looks at one completion per prompt and compares none."""
        return self.item is not Item.EDGE


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums of consecutive runs in a fixed order, in float64: values (M,), lengths (S,) -> (S,).

    float64 because a log-ratio of two long sequences is a small difference of large sums, and the
    vectors here are short.
    """
    # unsafe=True skips a check of the lengths that would wait for the device.
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, initial=0.0, unsafe=True)
