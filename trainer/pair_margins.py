"""The reward margins of held-out pairs, one by one: their standard errors, and a file to compare runs by."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from madpo.trainer.batches.steps import Step
from madpo.trainer.errors import UserError
from madpo.trainer.files import write_atomically

FILE = "held_out_pairs.json"
ACCURACY, MARGIN, PAIRS = "rewards/accuracies", "rewards/margins", "num_pairs"
STDERR = "_stderr"
"""Ending of the metric that is another one's standard error."""


@dataclass(frozen=True)
class PairMargins:
    """The policy's reward margins of E pairs, in the order of the data, prompt after prompt."""

    margins: np.ndarray  # (E,) float64
    prompt_pairs: np.ndarray  # (G,) pairs of each prompt

    def metrics(self) -> dict[str, float]:
        """The number of pairs, and the standard errors of accuracy and mean margin."""
        return {
            PAIRS: len(self.margins),
            ACCURACY + STDERR: standard_error(self.margins > 0, self.prompt_pairs),
            MARGIN + STDERR: standard_error(self.margins, self.prompt_pairs),
        }


def all_are_ties(record: Mapping[str, float], prefix: str = "") -> bool:
    """Whether every pair has margin 0, as where the policy still equals the reference.

    Nothing is ranked then, although each tie counts as wrong in the accuracy, which is 0.
    """
    return record[prefix + ACCURACY] == 0 == record.get(prefix + MARGIN)


def standard_error(
    values: np.ndarray,  # (E,)
    prompt_pairs: np.ndarray,  # (G,) pairs of each prompt
) -> float:
    """The standard error of the mean of the values.

    Prompts are independent of each other, the pairs of a prompt are not (Liang and Zeger 1986). With one pair
    per prompt it is the standard deviation over sqrt(E).
    """
    residuals = values - values.mean()
    prompts = np.repeat(np.arange(len(prompt_pairs)), prompt_pairs)
    return float(math.sqrt(np.square(np.bincount(prompts, residuals)).sum()) / len(values))


class PairCollector:
    """Collects the margins of an evaluation from its micro-batches on all ranks, without a host sync."""

    def __init__(
        self,
        prompt_pairs: np.ndarray,  # (G,) pairs of each prompt
        device: torch.device,
    ) -> None:
        self._prompt_pairs = prompt_pairs
        self._sums = torch.zeros(int(prompt_pairs.sum()), dtype=torch.float64, device=device)
        self._first, self._copies = 0, 1

    def add(
        self,
        positions: Tensor,  # (e,) among the pairs of the step
        margins: Tensor,  # (e,)
    ) -> None:
        self._sums[self._first + positions] = margins.double()

    def close_step(self, step: Step) -> None:
        """Let the next positions count from the first pair after this step."""
        self._first += step.num_edges
        self._copies = step.copies

    def gather(self) -> PairMargins:
        """All margins, on all ranks. One all-reduce, one copy to the host."""
        dist.all_reduce(self._sums)
        return PairMargins(self._sums.cpu().numpy() / self._copies, self._prompt_pairs)


@dataclass(frozen=True)
class StoredPairs:
    """The margins of a run's newest evaluation during training, as its folder keeps them."""

    step: int
    data: str  # fingerprint of the held-out tokens: runs that agree in it have the same pairs
    pairs: PairMargins


def write_pairs(folder: Path, stored: StoredPairs) -> None:
    """Write `held_out_pairs.json`, replacing that of the evaluation before: a list of margins per prompt."""
    ends = np.cumsum(stored.pairs.prompt_pairs)
    prompts = np.split(stored.pairs.margins, ends[:-1])
    margins = [[float(f"{margin:.6g}") for margin in prompt] for prompt in prompts]
    content = {"step": stored.step, "data": stored.data, "margins": margins}
    write_atomically(folder / FILE, json.dumps(content) + "\n")


def read_pairs(folder: Path) -> StoredPairs | None:
    """The contents of `held_out_pairs.json`; None if there is none. Raises UserError for a broken file."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        margins = [np.array(prompt, np.float64) for prompt in content["margins"]]
        pairs = PairMargins(np.concatenate(margins), np.array([len(prompt) for prompt in margins]))
        return StoredPairs(int(content["step"]), str(content["data"]), pairs)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {error}; remove it, the next evaluation writes it anew") from error
