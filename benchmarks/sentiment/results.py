"""The numbers of the sentiment experiment: means, paired differences and their standard errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from madpo.benchmarks.sentiment.evaluate import NAME

PAPER = {
    "madpo": {"high": 2.23, "medium": 2.23, "low": 1.95},
    "beta-dpo": {"high": 1.67, "medium": 1.84, "low": 1.76},
    "dpo": {"high": 1.62, "medium": 1.71, "low": 1.48},
    "ipo": {"high": 0.35, "medium": 0.31, "low": 0.10},
}
"""Mean oracle rewards of Rho 2025 (arXiv 2510.05342): gemma-3-270m on IMDb, another oracle."""


class Setting(NamedTuple):
    arm: str
    beta: float
    tier: str


@dataclass(frozen=True)
class Sample:
    """Measurements of the completions of one setting's models: (seeds, prompts) each."""

    rewards: np.ndarray
    kls: np.ndarray
    lengths: np.ndarray


def read(folder: Path) -> tuple[Sample, dict[Setting, Sample]]:
    """The SFT model's sample, and a sample for each setting in `runs.json`, its seeds in order."""
    records_of: dict[Setting, dict[int, dict[str, list[float]]]] = {}
    for run in json.loads((folder / "runs.json").read_text()):
        name = NAME.match(run)
        assert name is not None
        setting = Setting(name["arm"], float(name["beta"]), name["tier"])
        records_of.setdefault(setting, {})[int(name["seed"])] = json.loads(
            (folder / f"{run}.json").read_text()
        )
    settings = {
        setting: _sample([records[seed] for seed in sorted(records)])
        for setting, records in records_of.items()
    }
    return _sample([json.loads((folder / "sft.json").read_text())]), settings


def _sample(records: list[dict[str, list[float]]]) -> Sample:
    columns = (np.array([record[name] for record in records]) for name in ("rewards", "kls", "lengths"))
    return Sample(*columns)


class Estimate(NamedTuple):
    mean: float
    error: float  # one standard error

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"

    @property
    def signed(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


def estimate(values: np.ndarray) -> Estimate:
    """The mean of (seeds, prompts) values, and its standard error with two-way clustering.

    Seeds share prompts and prompts share seeds, so the variance is that of the seeds' means plus that of the
    prompts' means, minus what both count. With one seed it is over prompts only.

    Source: Cameron, Gelbach and Miller 2011.
    """
    seeds, prompts = values.shape
    over_prompts = values.mean(0).var(ddof=1) / prompts
    if seeds == 1:
        return Estimate(float(values.mean()), math.sqrt(over_prompts))
    over_seeds = values.mean(1).var(ddof=1) / seeds
    residual = values - values.mean(0) - values.mean(1)[:, None] + values.mean()
    both = (residual**2).sum() / ((seeds - 1) * (prompts - 1)) / (seeds * prompts)
    variance = max(over_seeds + over_prompts - both, over_seeds, over_prompts)
    return Estimate(float(values.mean()), math.sqrt(variance))


def difference(one: Sample, other: Sample) -> Estimate:
    """Mean reward of one minus the other, paired by seed and prompt."""
    seeds = min(len(one.rewards), len(other.rewards))
    return estimate(one.rewards[:seeds] - other.rewards[:seeds])


def at_equal_kl(settings: Mapping[Setting, Sample], arm: str, tier: str, kl: float) -> np.ndarray | None:
    """(seeds, prompts) rewards of an arm at a mean KL divergence of `kl`; None if its betas do not reach it.

    Interpolated between its two nearest betas in sqrt(KL), in which rewards are nearly linear at small KL.
    """
    points = sorted(
        (
            (float(sample.kls.mean()), sample)
            for setting, sample in settings.items()
            if (setting.arm, setting.tier) == (arm, tier)
        ),
        key=lambda point: point[0],
    )
    for (below, first), (above, second) in pairwise(points):
        if below <= kl <= above:
            share = (math.sqrt(kl) - math.sqrt(below)) / (math.sqrt(above) - math.sqrt(below))
            seeds = min(len(first.rewards), len(second.rewards))
            return (1 - share) * first.rewards[:seeds] + share * second.rewards[:seeds]
    return None
