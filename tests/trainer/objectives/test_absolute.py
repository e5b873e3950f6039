"""Absolute objectives, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from madpo.trainer.objectives import EdgeScores, build


def test_anchors_by_hand():
    """Scores 2 and -0.5, reference 1 and 0.25: D = 1.75."""
    scores = EdgeScores(*torch.tensor([[2.0], [-0.5], [1.0], [0.25]], dtype=torch.float64).unbind())
    base = math.log1p(math.exp(-0.1 * 1.75))

    def anchor(**parameters):
        return build("anchored_dpo", **parameters)(scores).item() - base

    assert anchor(anchor="linear") == pytest.approx(-3.25)
    assert anchor(anchor="lse", alpha=0.5) == pytest.approx(0.5 * math.log(math.exp(-3) + math.exp(-0.25)))
    assert anchor(anchor="hinge", tau=2.5) == pytest.approx(0.5 + 2.0)
