"""All mutable state of a run except weights and optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """How far a run is. The order of the data is a pure function of `consumed`."""

    step: int = 0  # optimiser steps done
    consumed: int = 0  # groups trained on, over all ranks
    num_tokens: int = 0  # packed tokens trained on, over all ranks
    epoch: float = 0.0  # passes over the training groups
    evaluated_step: int = -1  # the step of the newest evaluation on held-out data
    skipped: int = 0  # steps whose gradient was not finite, and that changed no weight
    skipped_in_a_row: int = 0
    memory: dict[str, list[float]] = field(default_factory=dict)  # what a global-batch objective keeps
