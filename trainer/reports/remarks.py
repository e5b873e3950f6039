"""Remarks before the first step: what is unusual about a run, while it can still be changed."""

from __future__ import annotations

import numpy as np

from madpo.trainer.config.defaults import kind_of, usual_rate
from madpo.trainer.config.schema import Config
from madpo.trainer.counted import counted

SHORT_RUN = 20
"""The number of steps below which a run is called short."""

FAR_FROM_USUAL = 20
"""The factor between a learning rate and the usual one from which it is remarked on."""

SMALL_MODEL = 300_000_000
"""The number of weights below which models take far higher learning rates."""

FAR_FROM_ONE = 2
"""The factor between the mean weight and 1 from which it is remarked on."""

ALIKE = 0.01
"""The relative spread of weights below which they change nothing but the learning rate."""


def remarks(
    config: Config,
    total_steps: int,
    parameters: tuple[int, int],  # trained, all
    weights: np.ndarray | None,  # (K,) of the training pairs or completions, or of a stream's first ones
) -> list[str]:
    """A sentence for each unusual thing."""
    found = [_on_length(config, total_steps), _on_rate(config, parameters), on_weights(config, weights)]
    return [remark for remark in found if remark]


def _on_length(config: Config, total_steps: int) -> str | None:
    if total_steps >= SHORT_RUN:
        return None
    steps, groups = counted(total_steps, "step"), counted(config.train.global_batch_size, "group")
    longer = "a smaller train.global_batch_size or more train.num_train_epochs make it longer"
    if config.train.max_steps is not None:
        longer = f"train.max_steps={config.train.max_steps} ends it"
    return f"a short run: {steps} of {groups}; {longer}"


def _on_rate(config: Config, parameters: tuple[int, int]) -> str | None:
    trained, total = parameters
    kind, rate, adapter = kind_of(config.bound_objective), config.optim.lr, trained < total / 2
    usual = usual_rate(kind, adapter)
    is_low, is_high = rate * FAR_FROM_USUAL <= usual, rate >= usual * FAR_FROM_USUAL
    if not is_low and not (is_high and total >= SMALL_MODEL):
        return None
    return (
        f"optim.lr {rate:g} is {'low' if is_low else 'high'}: about {usual:g} is usual for {kind.value} with "
        f"{'an adapter' if adapter else 'all weights'}"
    )


def on_weights(config: Config, weights: np.ndarray | None) -> str | None:
    """The weights of the losses, which decide whether a weighted objective differs from its plain form."""
    if weights is None or not len(weights):
        return None
    low, middle, high = np.quantile(weights, [0.05, 0.5, 0.95])
    source = config.objective.loss_type if config.bound_objective.weight else "the data set"
    if not weights.any():
        return f"weights of {source}: all are 0, so nothing is learnt"
    remark = f"weights of {source}: median {middle:.3g}, nine of ten from {low:.3g} to {high:.3g}"
    if high - low > ALIKE * middle:
        mean = float(weights.mean())
        if 1 / FAR_FROM_ONE <= mean <= FAR_FROM_ONE:
            return remark
        return f"{remark}; their mean, {mean:.3g}, multiplies gradients as the learning rate does"
    if source != "madpo":
        return f"{remark}; all are alike, so they change nothing but the learning rate"
    rate = "" if abs(middle - 1) <= ALIKE else f" at {middle:.3g} times the learning rate"
    return f"{remark}; they do not vary, so this is DPO{rate} (docs/tau.md)"
