"""Offsets of the margin, by hand."""

from __future__ import annotations

import math

import pytest
from score_cases import edge

from madpo.trainer.objectives import EdgeScores, build


def test_ties_by_hand():
    """The three outcomes of two completions have probabilities that sum to one; D is 1.3."""
    scores = edge()
    flipped = EdgeScores(
        scores.rejected_logps, scores.chosen_logps, scores.ref_rejected_logps, scores.ref_chosen_logps,
        margins=scores.margins,
    )  # fmt: skip
    win, loss = (build("todo", theta=0.7)(x).item() for x in (scores, flipped))
    tie = build("todo", theta=0.7, tie_margin=2.0)(scores).item()
    assert win == pytest.approx(math.log1p(math.exp(-(0.13 - 0.7))))
    assert sum(math.exp(-x) for x in (win, loss, tie)) == pytest.approx(1.0)
    by_hand = math.log((1 + math.exp(0.83)) * (1 + math.exp(0.57)) / (math.exp(1.4) - 1))
    assert tie == pytest.approx(by_hand)
