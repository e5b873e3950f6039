"""Scored completions of one prompt -> one preference pair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from madpo.trainer.formats.text_groups import Text


class Pair(NamedTuple):
    chosen: int
    rejected: int


def choose_pair(
    completions: Sequence[Text],
    scores: Sequence[float | None],
    how: Literal["best_worst", "bradley_terry"],
    random: np.random.Generator,
) -> Pair | str:
    """Which completion is preferred to which; or why there is no pair, in a word or two.

    best_worst takes the highest and the lowest score, the first of equals. bradley_terry takes two
    completions at random and prefers one with P = sigmoid(difference of their scores), as the noise of a
    human label does: the larger of score + Gumbel noise (Bradley and Terry 1952; the set-up of MADPO's
    experiments). Completions without a score or without text take no part.
    """
    able = [i for i, score in enumerate(scores) if score is not None and not _is_empty(completions[i])]
    if len(able) < 2:
        return "fewer than two with text and score"
    values = np.array([scores[i] for i in able], dtype=np.float64)
    if how == "best_worst":
        if values.max() == values.min():
            return "tie"
        pair = Pair(able[int(values.argmax())], able[int(values.argmin())])
    else:
        one, other = random.choice(len(able), size=2, replace=False)
        noisy = values + random.gumbel(size=len(able))
        winner, loser = (one, other) if noisy[one] >= noisy[other] else (other, one)
        pair = Pair(able[winner], able[loser])
    return "equal texts" if completions[pair.chosen] == completions[pair.rejected] else pair


def pair_row(
    prompt: Text, completions: Sequence[Text], scores: Sequence[float | None], pair: Pair
) -> dict[str, object]:
    """A row of the layout `preference`, with what the judge gave."""
    won, lost = scores[pair.chosen], scores[pair.rejected]
    assert won is not None and lost is not None
    return {
        "prompt": prompt,
        "chosen": completions[pair.chosen],
        "rejected": completions[pair.rejected],
        "score_chosen": won,
        "score_rejected": lost,
        "margin": won - lost,
    }


def random_of(*identity: int | str) -> np.random.Generator:
    """A generator that depends on what it is for and on nothing else."""
    return np.random.default_rng(list(json.dumps(identity).encode()))


def _is_empty(completion: Text) -> bool:
    return not (completion if isinstance(completion, str) else completion[-1]["content"])
