"""Losses of pairs that look at single tokens of the completions, or at the tokens' distributions."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import Outcome, Params, objective
from madpo.trainer.objectives.fields import Beta
from madpo.trainer.objectives.scores import Scored, segment_sum


class LDDPOParams(Params):
    loss_type: Literal["ld_dpo"] = "ld_dpo"
    beta: Beta = 0.1
    alpha: Annotated[
        float,
        Field(ge=0, le=1, description="weight of tokens beyond the shorter completion's length; 1 is DPO"),
    ] = 0.5


@objective(LDDPOParams, {"reference", "tokens"})
def ld_dpo(scored: Scored, params: LDDPOParams) -> Tensor:
    """L = -log sigmoid(beta D'), D' as D with a weight alpha on tokens beyond min(n_w, n_l).

    Source: Liu et al. 2024 (arXiv 2409.06411), as TRL has it.
    """
    assert scored.ref_token_logps is not None
    ratios = scored.token_logps.double() - scored.ref_token_logps.double()
    won, lost = scored.chosen, scored.rejected
    shared = torch.minimum(scored.lengths[won], scored.lengths[lost])
    ends = torch.cat((ratios.new_zeros(1), ratios.cumsum(0)))  # (M + 1,) sums of all tokens before
    starts = scored.lengths.cumsum(0) - scored.lengths
    whole = scored.logratios

    def damped(sequences: Tensor) -> Tensor:
        """Log-ratios (E,) of the sequences (E,), with a weight alpha on their tails."""
        first = starts[sequences]
        head = ends[first + shared] - ends[first]
        return params.alpha * whole[sequences] + (1 - params.alpha) * head

    return -F.logsigmoid(params.beta * (damped(won) - damped(lost)))


class WPOParams(Params):
    loss_type: Literal["wpo"] = "wpo"
    beta: Beta = 0.01
    clamp: Annotated[bool, Field(description="limit weights to 1, as the authors do")] = True


@objective(WPOParams, {"reference", "lengths", "distributions"})
def wpo(scored: Scored, params: WPOParams) -> Outcome:
    """L = -sg[w_w w_l] log sigmoid(beta D), w = exp(mean_t (log p_t - log sum_v p_v^2)).

    Pairs that the policy itself might have written count more; `clamp` bounds the product at 1.
    Source: Zhou et al. 2024 (arXiv 2406.11827) and the authors' code; TRL does not clamp.
    """
    assert scored.log_collisions is not None
    likelier = scored.token_logps.detach() - scored.log_collisions.detach()
    means = segment_sum(likelier, scored.lengths) / scored.lengths.clamp(min=1)
    weights = torch.exp(means[scored.chosen] + means[scored.rejected])
    weights = weights.clamp(max=1.0) if params.clamp else weights
    return Outcome(-weights * F.logsigmoid(params.beta * scored.edges.deltas), {"wpo/weight": weights})


class TDPOParams(Params):
    loss_type: Literal["tdpo"] = "tdpo"
    beta: Beta = 0.1
    alpha: Annotated[float, Field(ge=0, description="factor on rejected minus chosen KL")] = 0.5
    stop_gradient: Annotated[
        bool,
        Field(description="no gradient through the chosen KL; true is TDPO2, false with alpha 1 is TDPO1"),
    ] = True


@objective(TDPOParams, {"reference", "distributions", "kl"})
def tdpo(scored: Scored, params: TDPOParams) -> Outcome:
    """L = -log sigmoid(beta (D - alpha (K_l - sg[K_w]))), K = sum_t KL(pi_ref || pi) of the distributions.

    Source: Zeng et al. 2024 (arXiv 2404.11999), equations 16 and 17, and the authors' code.
    """
    assert scored.kl is not None
    kl = segment_sum(scored.kl, scored.lengths)
    chosen, rejected = kl[scored.chosen], kl[scored.rejected]
    gap = rejected - (chosen.detach() if params.stop_gradient else chosen)
    losses = -F.logsigmoid(params.beta * (scored.edges.deltas - params.alpha * gap))
    return Outcome(losses, {"tdpo/kl_chosen": chosen.detach(), "tdpo/kl_rejected": rejected.detach()})
