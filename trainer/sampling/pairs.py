"""The scored completions of one prompt -> one preference pair."""

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
    """The pair, as indices of completions; or in a few words why there is none.

    best_worst takes the highest and the lowest score, the first of equals. bradley_terry takes two
    completions at random and prefers one with P = sigmoid(difference of their scores), like a noisy human
    label: the one with the larger score + Gumbel noise (Bradley and Terry 1952; the set-up of MADPO's
    experiments). Completions without a score or without text are left out.
    """
    eligible = [i for i, score in enumerate(scores) if score is not None and not _is_empty(completions[i])]
    if len(eligible) < 2:
        return "fewer than two with text and score"
    values = np.array([scores[i] for i in eligible], dtype=np.float64)
    if how == "best_worst":
        if values.max() == values.min():
            return "tie"
        pair = Pair(eligible[int(values.argmax())], eligible[int(values.argmin())])
    else:
        one, other = random.choice(len(eligible), size=2, replace=False)
        noisy = values + random.gumbel(size=len(eligible))
        chosen, rejected = (one, other) if noisy[one] >= noisy[other] else (other, one)
        pair = Pair(eligible[chosen], eligible[rejected])
    return "equal texts" if completions[pair.chosen] == completions[pair.rejected] else pair


def pair_row(
    prompt: Text, completions: Sequence[Text], scores: Sequence[float | None], pair: Pair
) -> dict[str, object]:
    """An example of the layout `preference`, with the judge's scores and their margin."""
    score_chosen, score_rejected = scores[pair.chosen], scores[pair.rejected]
    assert score_chosen is not None and score_rejected is not None
    return {
        "prompt": prompt,
        "chosen": completions[pair.chosen],
        "rejected": completions[pair.rejected],
        "score_chosen": score_chosen,
        "score_rejected": score_rejected,
        "margin": score_chosen - score_rejected,
    }


def random_of(*identity: int | str) -> np.random.Generator:
    """A random generator seeded by what it is for, and by nothing else."""
    return np.random.default_rng(list(json.dumps(identity).encode()))


def _is_empty(completion: Text) -> bool:
    return not (completion if isinstance(completion, str) else completion[-1]["content"])
