"""MixDPO by hand."""

from __future__ import annotations

import pytest
from score_cases import edge

from madpo.trainer.objectives import build


def test_mixdpo_routes_by_the_margin():
    """The margin of the edge is 2: easy below a threshold of 2, which is not smaller, difficult above."""
    for threshold in (0.5, 2.0):
        easy = build("mixdpo", beta=0.1, threshold=threshold)(edge()).item()
        assert easy == pytest.approx(0.6432581947, abs=1e-9)
    assert build("mixdpo", base="simpo").needs == {"margins", "lengths"}
    assert build("mixdpo", threshold=2.1)(edge()).item() == pytest.approx(1.2)
    assert build("mixdpo", base="ipo", beta=0.1)(edge()).item() == pytest.approx(13.69)
    simpo = build("mixdpo", base="simpo", beta=2.0, gamma=1.0)(edge()).item()
    assert simpo == pytest.approx(1.2411538747, abs=1e-9)
