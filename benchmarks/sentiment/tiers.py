"""Preference pairs of three tiers of quality, with labels drawn by the Bradley-Terry model of the oracle.

high    two samples of the SFT model
low     the better of the two against the human continuation of a negative review: easy, large margins
medium  the first half of the prompts as in low, the second as in high
Source: Rho 2025 (arXiv 2510.05342) and the author's notebooks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from madpo.benchmarks.sentiment.oracle import reward
from madpo.benchmarks.sentiment.text import write_rows

TIERS = ("high", "medium", "low")
HELD_OUT = 6
"""One pair in 6 is held out."""


@dataclass(frozen=True)
class Candidate:
    """A prompt with two completions and the oracle's rewards, not yet labelled."""

    prompt: str
    completions: tuple[str, str]
    rewards: tuple[float, float]


def make(output: Path, generated: str, people: str, seeds: Sequence[int], noise: float = 1.0) -> None:
    """Write `<tier>/seed-<seed>/` for every tier and seed: prompt, chosen, rejected and the oracle's margin,
    in train.jsonl and test.jsonl. Beside it, `<tier>/seed-<seed>-noised/` has margins with noise of `noise`
    times their own standard deviation.

    `generated` is the output of `madpo generate` with the oracle as judge, `people` the file of the prompts
    with the human continuations. A seed decides the labels, which pairs are held out, and the noise.
    """
    sampled = _read(Path(generated))
    human = {row["prompt"]: row["completion"] for row in _read(Path(people))}
    facts = {}
    for tier in TIERS:
        candidates = candidates_of(tier, sampled, human)
        for seed in seeds:
            rows = labelled(candidates, seed)
            _write(output / tier / f"seed-{seed}", rows)
            _write(output / tier / f"seed-{seed}-noised", noised(rows, noise, seed))
            margins = np.array([row["margin"] for row in rows])
            facts[f"{tier} {seed}"] = {
                "pairs": len(rows),
                "label_agrees_with_oracle": round(float((margins > 0).mean()), 4),
                "no_margin": round(float((margins == 0).mean()), 4),
                "abs_margin_quartiles": np.quantile(np.abs(margins), (0.25, 0.5, 0.75)).round(3).tolist(),
            }
    (output / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    for name, fact in facts.items():
        print(name, fact)


def candidates_of(tier: str, sampled: Sequence[dict[str, Any]], human: dict[str, str]) -> list[Candidate]:
    """The candidates of one tier: one for every two samples of a prompt, of the same prompts in all tiers."""
    candidates = []
    for index, row in enumerate(sampled):
        easy = tier == "low" or (tier == "medium" and index < len(sampled) // 2)
        samples = list(zip(row["completions"], row["scores"], strict=True))
        for one, two in zip(samples[::2], samples[1::2], strict=False):
            if easy:
                written = human[row["prompt"]]
                one, two = max(one, two, key=lambda s: s[1]), (written, reward(row["prompt"] + written))
            candidates.append(Candidate(row["prompt"], (one[0], two[0]), (one[1], two[1])))
    return candidates


def labelled(candidates: Sequence[Candidate], seed: int) -> list[dict[str, Any]]:
    """Labelled pairs in random order. Equal or empty completions make no pair.

    The first completion is chosen with probability sigmoid(r1 - r2): Gumbel noise is added to each reward,
    and the larger sum wins.
    """
    random = np.random.default_rng((seed, 1))
    noise = random.gumbel(size=(len(candidates), 2))
    rows = []
    for index in random.permutation(len(candidates)):
        candidate = candidates[index]
        (one, two), (first, second) = candidate.completions, candidate.rewards
        if one == two or not (one and two):
            continue
        margin = first - second
        if margin + noise[index, 0] - noise[index, 1] < 0:
            one, two, margin = two, one, -margin
        rows.append({"prompt": candidate.prompt, "chosen": one, "rejected": two, "margin": margin})
    return rows


def noised(rows: Sequence[dict[str, Any]], noise: float, seed: int) -> list[dict[str, Any]]:
    """Copies of the rows with normal noise on the margins, of `noise` times their standard deviation."""
    spread = noise * np.std([row["margin"] for row in rows])
    errors = np.random.default_rng((seed, 2)).normal(scale=spread, size=len(rows))
    return [{**row, "margin": row["margin"] + float(error)} for row, error in zip(rows, errors, strict=True)]


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    held_out = len(rows) // HELD_OUT
    write_rows(folder / "train.jsonl", rows[held_out:])
    write_rows(folder / "test.jsonl", rows[:held_out])


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:  # str.splitlines would cut at more than a line's end
        return [json.loads(line) for line in file]
