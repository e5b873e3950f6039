"""The oracle of the sentiment experiment: three times VADER's compound score, in [-3, 3].

The paper's oracle is a classifier's (p - 0.5) * 6, of the same range. VADER is a lexicon with rules; how far
it agrees with people is measured on its own 20-rater sentences.
Source: Hutto and Gilbert 2014 (ICWSM); Rho 2025 (arXiv 2510.05342) for the experiment.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from madpo.trainer.data import rated_sentences
from madpo.trainer.errors import UserError
from madpo.trainer.packages import install

SCALE = 3.0


@cache
def _analyser() -> Any:
    try:
        from vaderSentiment.vaderSentiment import (  # pyright: ignore[reportMissingImports]
            SentimentIntensityAnalyzer,
        )
    except ImportError:
        raise UserError(f"the oracle is vaderSentiment: {install('madpo[sentiment]')}") from None
    return SentimentIntensityAnalyzer()


def reward(text: str) -> float:
    """In [-3, 3]; 0 is neutral."""
    return SCALE * _analyser().polarity_scores(text)["compound"]


def judge(prompts: list[str], completions: list[list[str]]) -> list[list[float]]:
    """The rewards of prompt and completion together, for `madpo generate`."""
    return [
        [reward(prompt + one) for one in several]
        for prompt, several in zip(prompts, completions, strict=True)
    ]


def validate(output: Path) -> None:
    """Write `validation.json`: the oracle against people's ratings, by kind of text."""
    items = rated_sentences.read(rated_sentences.fetch(output / "download"))
    found = {}
    for kind in rated_sentences.DOMAINS.values():
        pairs = np.array([(reward(x.text), x.rating) for x in items if x.prompt == kind])
        found[kind.rstrip(":")] = {
            "sentences": len(pairs),
            "pearson": round(float(np.corrcoef(pairs.T)[0, 1]), 3),
            "same_sign": round(float((np.sign(pairs[:, 0]) == np.sign(pairs[:, 1])).mean()), 3),
        }
    output.mkdir(parents=True, exist_ok=True)
    (output / "validation.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
