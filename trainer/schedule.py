"""The length of a run, and its learning rate as a pure function of the step: no state to resume."""

from __future__ import annotations

import math
from dataclasses import dataclass

from madpo.trainer.config.schema import Config
from madpo.trainer.config.train import OptimConfig, TrainConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimiser step `step`, counted from 0, of `total_steps`.

    Linear warm-up from above 0, so that the first step changes the weights; then constant, or a linear
    or half-cosine decay to 0 after the last step.
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


@dataclass(frozen=True)
class RunLength:
    """The length of a run, known before it starts."""

    total_groups: int
    total_steps: int


def run_length(config: Config, num_groups: int | None) -> RunLength:
    """The length of a run: `max_steps`, or else `num_train_epochs`, whose last step may be smaller.

    A stream has no `num_groups`, so its config must set `max_steps`.
    """
    train = config.train
    if train.max_steps is not None:
        return RunLength(train.max_steps * train.global_batch_size, train.max_steps)
    assert num_groups is not None
    # Rounded first: 0.07 epochs of 100 groups are 7, not the 8 that 7.000000000000001 would make.
    groups = math.ceil(round(train.num_train_epochs * num_groups, 6))
    return RunLength(groups, math.ceil(groups / train.global_batch_size))


LOG_LINES = 20
"""The fewest lines of metrics of a run with `train.logging_steps: auto`, if it has as many steps."""


def logging_steps(train: TrainConfig, total_steps: int) -> int:
    """The steps between two lines of metrics."""
    if train.logging_steps == "auto":
        return max(1, min(10, total_steps // LOG_LINES))
    return train.logging_steps
