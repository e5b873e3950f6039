"""What the trainer requires of a model, and what its forward pass returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from madpo.kernels.token_scores import TokenScores
from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.data.lengths import PositionBorder
from madpo.trainer.objectives.build import BoundObjective
from madpo.trainer.sequence_parallel import SequenceGroup


class Mode(Enum):
    """What a forward pass computes.

    An argument of `forward` rather than methods, because ZeRO-3 gathers weights around `forward` only.
    """

    LOSS = "loss"
    """Scores, and the batch's loss with its gradient."""
    SCORE = "score"
    """Scores only; the loss is a constant 0."""
    FROM_GRADIENTS = "from gradients"
    """A loss whose gradients in the completions' log-probs are given; scores of the policy only."""
    EXCHANGE = "exchange"
    """Scores, from which a given function forms gradients, and then the loss of FROM_GRADIENTS."""


Exchange = Callable[[PackedBatch, TokenScores], Tensor]
"""(a batch, its scores (M,)) -> (S,) the gradient of the step's loss in the log-probs of its completions."""

Gradients = Tensor | Exchange | None
"""The argument that goes with a `Mode`: (S,) gradients for FROM_GRADIENTS, a function for EXCHANGE."""


class ScoredLoss(NamedTuple):
    """What a forward pass returns; only `loss` carries a gradient."""

    loss: Tensor  # ()
    tokens: TokenScores  # (M,)


Context = Callable[[], AbstractContextManager[None]]
Switch = Callable[[nn.Module], Context]
"""A model, or a part of one -> a context manager inside which it computes the reference."""


@dataclass(frozen=True)
class ReferenceScorer:
    """How the reference is computed: by a model of its own, or by the policy without its adapter."""

    model: PreTrainedModel
    switch: Switch = lambda part: nullcontext

    def state(self) -> AbstractContextManager[None]:
        """Have `model` compute the reference, while inside: its adapter is off, or swapped."""
        return self._state()

    @cached_property
    def _state(self) -> Context:
        return self.switch(self.model)


class Head(Protocol):
    """The part of a model that forms scores and loss from hidden states."""

    objective: BoundObjective
    weight: nn.Parameter
    ref_weight: nn.Parameter | None


class ScoringModule(Protocol):
    """What the trainer requires of a model. `PolicyWithReference` and `RewardModel` provide it."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None  # a frozen model of its own; the name is in checkpoints
    sequence_group: SequenceGroup | None  # ranks that share a packed row
    notes: list[str]  # what a user should know of the models; printed before the first step
    repeats_layers: bool  # activation checkpointing computes the policy's layers again in backward

    @property
    def head(self) -> Head: ...

    @property
    def reference_scorer(self) -> ReferenceScorer | None:
        """How the reference is computed; None where the objective needs none."""
        ...

    @property
    def shares_rows(self) -> bool:
        """Whether sequences may share a packed row, and completions their prompt."""
        ...

    @property
    def borders(self) -> tuple[PositionBorder, ...]:
        """Lengths beyond which the models encode positions otherwise."""
        ...

    @property
    def loss_of_tokens(self) -> bool:
        """Whether the loss has a term over all packed tokens, so that no completion may be skipped."""
        ...

    @property
    def stats(self) -> Mapping[str, Tensor]:
        """Means () over the packed tokens of the last batch, for the log."""
        ...

    def __call__(
        self, batch: PackedBatch, mode: Mode = Mode.LOSS, gradients: Gradients = None
    ) -> tuple[Tensor | None, ...]:
        """The loss, then the fields of `TokenScores`, as a plain tuple.

        DeepSpeed's hooks rebuild tuples and may not know named ones; `Engine` restores the type.
        """
        ...
