"""Supervised fine-tuning: the negative log-likelihood of the completions' tokens."""

from __future__ import annotations

from typing import Literal

from madpo.trainer.objectives.base import Item, Objective, Outcome, Params, Scored


class NLLParams(Params):
    loss_type: Literal["nll"] = "nll"


def nll(scored: Scored, params: NLLParams) -> Outcome:
    """L = -log pi(token | prefix), one loss per completion token, (M,)."""
    return Outcome(-scored.token_logps)


OBJECTIVE = Objective(nll, NLLParams, item=Item.TOKEN, needs_reference=False)
