"""Global-batch losses: each pair's depends on the other pairs of the step, of all ranks."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from madpo.trainer.objectives.base import BatchState, Outcome, Params, objective
from madpo.trainer.objectives.fields import Beta, Gamma, LabelSmoothing, Scale
from madpo.trainer.objectives.scores import EdgeScores

Momentum = Annotated[
    float, Field(ge=0, lt=1, description="share of the old value in the running mean and deviation")
]


class BetaDPOParams(Params):
    loss_type: Literal["beta_dpo"] = "beta_dpo"
    beta: Beta = 0.1
    alpha: Annotated[float, Field(ge=0, description="how strongly beta follows the mean of the step")] = 0.6
    drop: Annotated[float, Field(ge=0, lt=1, description="share of pairs that the filter leaves out")] = 0.2
    momentum: Momentum = 0.9
    min_beta: Annotated[float, Field(gt=0, description="smallest beta of a step")] = 1e-3


@objective(BetaDPOParams, {"reference", "batch"})
def beta_dpo(scores: EdgeScores, params: BetaDPOParams, state: BatchState) -> Outcome:
    """L = -log sigmoid(b D) for the pairs that the filter draws, 0 for the others.

    M0 and s0 are the running mean and deviation of D, updated before use. Of E pairs (1 - drop) E are drawn
    without replacement, with weights exp(-((D - M0) / s0)^2 / 2). b = max(beta (1 + alpha (mean of the drawn
    D - M0)), min_beta). The mean of the losses is over all pairs, as in the authors' code.
    Source: Wu et al. 2024 (arXiv 2407.08639) and the authors' code.
    """
    gaps = scores.deltas.detach().double()
    mean, std, memory = _running(gaps, params.momentum, state)
    log_weights = torch.zeros_like(gaps) if std == 0 else -0.5 * ((gaps - mean) / std).square()
    # The largest of log-weights plus Gumbel noise are a weighted draw without replacement.
    noise = -torch.log(-torch.log(_uniforms(len(gaps), state).to(gaps.device)))
    drawn = torch.zeros_like(gaps, dtype=torch.bool)
    count = max(int(len(gaps) * (1 - params.drop)), 1)
    drawn[torch.topk(log_weights + noise, count).indices] = True
    beta = params.beta * (1 + params.alpha * (gaps[drawn].mean() - mean))
    beta = beta.clamp(min=params.min_beta)
    losses = torch.where(drawn, -F.logsigmoid(beta.to(scores.deltas.dtype) * scores.deltas), 0.0)
    return Outcome(losses, {"beta_dpo/beta": beta.expand_as(gaps), "beta_dpo/kept": drawn.double()}, memory)


class AlphaDPOParams(Params):
    loss_type: Literal["alpha_dpo"] = "alpha_dpo"
    beta: Scale = 2.5
    gamma: Gamma = 1.5
    alpha: Annotated[
        float, Field(ge=0, description="factor on the standardised gap between policy and reference")
    ] = 0.2
    momentum: Momentum = 0.9


@objective(AlphaDPOParams, {"reference", "lengths", "batch"})
def alpha_dpo(scores: EdgeScores, params: AlphaDPOParams, state: BatchState) -> Outcome:
    """L = -log sigmoid(beta (u_w - u_l) - gamma - sg[beta alpha (G - mu) / sd]).

    G = a / n_w - b / n_l is the gap to the reference per token; mu and sd are its running mean and
    deviation, updated before use. With alpha 0 it is SimPO.
    Source: Wu et al. 2024 (arXiv 2410.10148) and the authors' code.
    """
    won, lost = scores.counts
    gaps = (scores.chosen_logratios / won - scores.rejected_logratios / lost).detach().double()
    mean, std, memory = _running(gaps, params.momentum, state)
    standard = torch.zeros_like(gaps) if std == 0 else (gaps - mean) / std
    z = params.beta * (scores.chosen_means - scores.rejected_means) - params.gamma
    return Outcome(-F.logsigmoid(z - (params.beta * params.alpha * standard).to(z.dtype)), memory=memory)


class AMaPOParams(Params):
    loss_type: Literal["amapo"] = "amapo"
    beta: Scale = 2.0


@objective(AMaPOParams, {"lengths", "batch"})
def amapo(scores: EdgeScores, params: AMaPOParams) -> Outcome:
    """L = -log sigmoid(beta G - sg[m]), m = beta exp((mean - G) / std * mean) where G < mean, else 0.

    G = u_w - u_l per token; mean and std are those of the step. There is no reference.
    Source: AMaPO's authors' code (2025).
    """
    gaps = scores.chosen_means - scores.rejected_means
    fixed = gaps.detach().double()
    mean, std = _moments(fixed)
    lag = torch.zeros_like(fixed) if std == 0 else (mean - fixed) / std
    margins = torch.where(lag > 0, params.beta * torch.exp(lag * mean), 0.0)
    losses = -F.logsigmoid(params.beta * gaps - margins.to(gaps.dtype))
    return Outcome(losses, {"amapo/margin": margins})


class DrDPOParams(Params):
    loss_type: Literal["dr_dpo"] = "dr_dpo"
    beta: Beta = 0.1
    beta_prime: Annotated[
        float, Field(gt=0, description="temperature over the pairs of a step; infinity would be DPO")
    ] = 1.0


@objective(DrDPOParams, {"reference", "batch"})
def dr_dpo(scores: EdgeScores, params: DrDPOParams) -> Tensor:
    """L = -b' log mean_i exp(-L_i / b'), L_i the DPO losses of the step: pairs of large loss count less.

    L is one number for the whole step, repeated for every pair.
    Source: Wu et al. 2024 (arXiv 2407.07880) and the authors' code.
    """
    losses = -F.logsigmoid(params.beta * scores.deltas)
    log_mean = torch.logsumexp(-losses / params.beta_prime, 0) - np.log(max(len(losses), 1))
    return (-params.beta_prime * log_mean).expand_as(losses)


class AOTParams(Params):
    loss_type: Literal["aot"] = "aot"
    beta: Beta = 0.01
    label_smoothing: LabelSmoothing = 0.0


@objective(AOTParams, {"reference", "batch"})
def aot(scores: EdgeScores, params: AOTParams) -> Tensor:
    """L_i = -(1 - e) log sigmoid(beta d_i) - e log sigmoid(-beta d_i), d = sort(l_w - l_l) - sort(r_w - r_l).

    Quantiles of the policy's gaps are compared with those of the reference's, over the step.
    Source: Melnyk et al. 2024 (arXiv 2406.05882), as TRL has it.
    """
    assert scores.ref_chosen_logps is not None and scores.ref_rejected_logps is not None
    gaps = scores.chosen_logps - scores.rejected_logps
    ref_gaps = scores.ref_chosen_logps - scores.ref_rejected_logps
    return _smoothed(params.beta * (gaps.sort().values - ref_gaps.sort().values), params.label_smoothing)


class AOTUnpairedParams(AOTParams):
    loss_type: Literal["aot_unpaired"] = "aot_unpaired"  # pyright: ignore[reportIncompatibleVariableOverride]


@objective(AOTUnpairedParams, {"reference", "batch"})
def aot_unpaired(scores: EdgeScores, params: AOTUnpairedParams) -> Tensor:
    """L_i as in `aot`, with d = sort(a) - sort(b): pairs are ignored, all chosen meet all rejected.

    Source: Melnyk et al. 2024 (arXiv 2406.05882), as TRL has it.
    """
    chosen, rejected = scores.chosen_logratios.sort().values, scores.rejected_logratios.sort().values
    return _smoothed(params.beta * (chosen - rejected), params.label_smoothing)


class GammaPOParams(Params):
    loss_type: Literal["gamma_po"] = "gamma_po"
    beta: Annotated[float, Field(gt=0, description="factor on a pair's gap")] = 2.5
    gamma: Annotated[float, Field(gt=0, description="mean of the pairs' margins")] = 1.0
    tau: Annotated[float, Field(gt=0, description="how strongly margins are pulled to their mean")] = 10.0
    base: Annotated[
        Literal["simpo", "dpo"], Field(description="loss that gets the margins: simpo or dpo")
    ] = "simpo"


@objective(
    GammaPOParams, lambda params: frozenset({"batch", "lengths" if params.base == "simpo" else "reference"})
)
def gamma_po(scores: EdgeScores, params: GammaPOParams, state: BatchState) -> Outcome:
    """L = -log sigmoid(beta G - g_i), G = u_w - u_l; for base dpo beta D - (g_i - gamma).

    The margins g = gamma N p minimise mean_i -log sigmoid(beta G_i - g_i) + tau KL(p || uniform) by
    exponentiated gradients, over the step's pairs and, below 256, earlier ones from a queue of 2048.
    Source: Sun et al. 2025 (gamma-PO) and the authors' code; beta, gamma and tau are assumed defaults.
    """
    simpo = params.base == "simpo"
    z = params.beta * (scores.chosen_means - scores.rejected_means if simpo else scores.deltas)
    fixed = z.detach().double()
    queue = torch.tensor(state.memory.get("gaps", []), dtype=fixed.dtype, device=fixed.device)
    drawn = _uniforms(len(queue), state).argsort()[: max(256 - len(fixed), 0)].to(fixed.device)
    margins = _target_margins(torch.cat((fixed, queue[drawn])), params)[: len(fixed)]
    losses = -F.logsigmoid(z - (margins - (0.0 if simpo else params.gamma)).to(z.dtype))
    memory = {"gaps": torch.cat((queue, fixed))[-2048:].tolist()}
    return Outcome(losses, {"gamma_po/margin": margins}, memory)


def _target_margins(gaps: Tensor, params: GammaPOParams) -> Tensor:
    """Margins (N,) for the gaps (N,). Nineteen updates: the authors make one more and do not use it."""
    scale, rate = params.gamma * len(gaps), min(0.5 / params.tau, 1.0)
    p = torch.full_like(gaps, 1 / max(len(gaps), 1))
    for _ in range(19):
        gradient = params.gamma * torch.sigmoid(scale * p - gaps)
        pull = params.tau * (1 + torch.log(len(gaps) * (p + 1e-10)))
        p = torch.softmax(torch.log(p) - rate * (gradient + pull), 0)
    return scale * p


def _smoothed(z: Tensor, e: float) -> Tensor:
    return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)


def _moments(values: Tensor) -> tuple[float, float]:
    """Mean and unbiased deviation (0 for a single value)."""
    return float(values.mean()), float(values.std()) if len(values) > 1 else 0.0


def _running(
    values: Tensor, momentum: float, state: BatchState
) -> tuple[float, float, dict[str, list[float]]]:
    """Running mean and deviation, which start at 0, updated with the step's values; and their memory."""
    old = state.memory.get("moments", [0.0, 0.0])
    mean, std = (momentum * x + (1 - momentum) * y for x, y in zip(old, _moments(values), strict=True))
    return mean, std, {"moments": [mean, std]}


def _uniforms(count: int, state: BatchState) -> Tensor:
    """Numbers (count,) in (0, 1) that depend on the state's seed only.

    The data's order draws with a key of this form too; the other counter keeps the draws apart.
    """
    words = np.random.Philox(key=list(state.seed), counter=[0, 0, 0, 1]).random_raw(count)
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
