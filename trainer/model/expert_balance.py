"""The load-balancing loss of mixtures of experts, which keeps a router from favouring a few of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from madpo.trainer.errors import UserError
from madpo.trainer.model.families import num_experts
from madpo.trainer.model.lora import is_adapted
from madpo.trainer.zero3.parameters import real_shape


@dataclass(frozen=True)
class ExpertBalance:
    """The load-balancing loss of the model's own family in transformers, and its weight in the step's loss.

    For each layer: the share of tokens that an expert gets times its mean probability, summed over the
    experts, times their number. The tokens are those of one packed row, in which a prompt counts once.
    Source: Fedus et al. 2021 (arXiv 2101.03961), equations 4 to 6.
    """

    coef: float
    function: Callable[..., Tensor]
    num_experts: int
    top_k: int

    def __call__(
        self,
        router_logits: tuple[Tensor, ...],  # (N, experts) of each mixture
    ) -> Tensor:  # ()
        loss = self.function(router_logits, self.num_experts, self.top_k)
        assert isinstance(loss, Tensor), "the backbone gave no router logits"
        return loss


def expert_balance(model: PreTrainedModel, coef: float) -> ExpertBalance | None:
    """The model's load-balancing loss; None if `coef` is 0. Raises UserError if its family has none."""
    if not coef:
        return None
    family: Any = sys.modules[type(model).__module__]
    parts: list[Any] = [
        getattr(family, "load_balancing_loss_func", None),
        getattr(model, "num_experts", None),
        getattr(model, "num_experts_per_tok", None),
    ]
    if None in parts:
        raise UserError(
            f"model.router_aux_loss_coef: {coef}, but transformers has no load-balancing loss for "
            f"{type(model).__name__}; set it to 0"
        )
    return ExpertBalance(coef, *parts)


def expert_notes(model: PreTrainedModel, coef: float) -> list[str]:
    """Notes on the experts for the start of a run."""
    experts = num_experts(model)
    if not experts:
        return []
    state = f"weighs {coef:g}" if coef else "is off (model.router_aux_loss_coef)"
    notes = [f"{experts} experts a layer; the loss that keeps them in balance {state}"]
    if is_adapted(model) and any(
        "expert" in name and len(real_shape(p)) == 3 for name, p in model.named_parameters()
    ):
        notes.append("the experts have no adapter: all of a layer are one parameter, out of LoRA's reach")
    return notes
