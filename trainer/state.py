"""All mutable state of a run besides weights and optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Counts say where a run is: the order of data is a pure function of `consumed`."""

    step: int = 0  # optimiser steps done
    consumed: int = 0  # groups trained on, over all ranks
    num_tokens: int = 0  # packed tokens trained on, over all ranks
    memory: dict[str, list[float]] = field(default_factory=dict)  # of an objective of the whole batch
