"""All mutable state of a run besides weights and optimiser."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass
class TrainState:
    """Two counts say where a run is: the order of data is a pure function of `consumed`."""

    step: int = 0  # optimiser steps done
    consumed: int = 0  # groups trained on, over all ranks
    num_tokens: int = 0  # packed tokens trained on, over all ranks

    def epoch(self, num_groups: int) -> float:
        return self.consumed / num_groups

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))
