"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from madpo.trainer.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of optimiser step `step`, counted from 0, of `total_steps`.

    Linear warm-up that starts above 0, so that the first step moves; then constant, or linear or
    half-cosine decay to 0 after the last step.
    """
    warmup = optim.warmup_steps or math.ceil(optim.warmup_ratio * total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - warmup, 1)
    if optim.lr_scheduler_type == "linear":
        return optim.lr * (1 - progress)
    if optim.lr_scheduler_type == "cosine":
        return optim.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.lr
