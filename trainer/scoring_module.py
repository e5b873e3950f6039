"""What the trainer needs of a model, and what one forward pass of it gives."""

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
from madpo.trainer.objectives.build import BoundObjective
from madpo.trainer.sequence_parallel import SequenceGroup


class Mode(Enum):
    """What a forward pass is asked for.

    It stands in one argument of `forward`, because ZeRO-3 gathers weights around that method alone.
    """

    LOSS = "loss"
    """Scores, and the batch's loss with its gradient."""
    SCORE = "score"
    """Scores alone; the loss is a constant 0."""
    FROM_GRADIENTS = "from gradients"
    """A loss whose gradient in the completions' log-probs is given; the policy's scores alone."""
    EXCHANGE = "exchange"
    """Scores first; from them a function forms the gradients, and with these the loss of FROM_GRADIENTS."""


Exchange = Callable[[PackedBatch, TokenScores], Tensor]
"""(a batch, its scores (M,)) -> (S,) the gradient of the step's loss in the log-probs of its completions."""

Gradients = Tensor | Exchange | None
"""What goes with a `Mode`: (S,) gradients for FROM_GRADIENTS, a function for EXCHANGE, else nothing."""


class ScoredLoss(NamedTuple):
    """What a forward pass gives; only `loss` carries a gradient."""

    loss: Tensor  # ()
    tokens: TokenScores  # (M,)


Context = Callable[[], AbstractContextManager[None]]
Switch = Callable[[nn.Module], Context]
"""A model, or a part of one -> the context in which it is the reference's."""


@dataclass(frozen=True)
class ReferenceScorer:
    """What the policy is compared with: a model of its own, or the policy without its adapter."""

    model: PreTrainedModel
    switch: Switch = lambda part: nullcontext

    def state(self) -> AbstractContextManager[None]:
        """Context manager; inside it `model` computes the reference (adapter off, or swapped)."""
        return self._state()

    @cached_property
    def _state(self) -> Context:
        return self.switch(self.model)


class Head(Protocol):
    """What forms scores and loss from hidden states."""

    objective: BoundObjective
    weight: nn.Parameter
    ref_weight: nn.Parameter | None


class ScoringModule(Protocol):
    """What the trainer needs of a model: `PolicyWithReference` and `RewardModel` have it."""

    policy: PreTrainedModel
    reference: PreTrainedModel | None  # a frozen model of its own; the name is in checkpoints
    sequence_group: SequenceGroup | None  # ranks that share a packed row
    notes: list[str]  # what a user should know of the models
    repeats_layers: bool  # activation checkpointing computes the policy's layers again in backward

    @property
    def head(self) -> Head: ...

    @property
    def reference_scorer(self) -> ReferenceScorer | None:
        """A model of its own, or the policy without its adapter; None where nothing is compared."""
        ...

    @property
    def shares_rows(self) -> bool:
        """Whether sequences may share a packed row, and completions their prompt."""
        ...

    @property
    def loss_of_tokens(self) -> bool:
        """Whether the loss has a term over all packed tokens, so that no completion may be left out."""
        ...

    @property
    def stats(self) -> Mapping[str, Tensor]:
        """(), of the last batch: means over its packed tokens, for the log."""
        ...

    def __call__(
        self, batch: PackedBatch, mode: Mode = Mode.LOSS, gradients: Gradients = None
    ) -> tuple[Tensor | None, ...]:
        """The loss and then the fields of `TokenScores`, as a plain tuple.

        DeepSpeed's hooks rebuild tuples and may not know of names; `Engine` gives them their type.
        """
        ...
