"""Losses of single tokens, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from score_cases import scored

from madpo.trainer.objectives import build
from madpo.trainer.objectives.base import Item
from madpo.trainer.objectives.registry import OBJECTIVES


def test_nll_is_one_loss_per_token():
    logps = torch.tensor([-1.0, -2.0, -3.0])
    entry = OBJECTIVES["nll"]
    assert entry.item is Item.TOKEN
    assert entry(scored(logps, None, [3]), entry.params()).losses.tolist() == [1, 2, 3]


def test_functions_of_probability_by_hand():
    logps = torch.tensor([math.log(0.1), math.log(0.5)], dtype=torch.float64)
    tokens = scored(logps, None, [2])

    def losses(name, **parameters):
        return build(name, **parameters)(tokens).tolist()

    assert losses("f_alpha", alpha=1.0) == pytest.approx([0.9, 0.5])
    assert losses("f_alpha", alpha=0.0) == pytest.approx([-math.log(0.1), -math.log(0.5)])
    assert losses("f_alpha", alpha=1e-5) == pytest.approx([-math.log(0.1), -math.log(0.5)], rel=1e-4)
    assert losses("f_alpha", alpha=10.0) == pytest.approx([(1 - 0.1**10) / 10, (1 - 0.5**10) / 10])
    assert losses("thresholded_nll", threshold=0.2) == pytest.approx([0.0, -math.log(0.5)])
    assert losses("thresholded_nll", keep="below", loss="linear") == pytest.approx([0.9, 0.0])
    assert losses("dft") == pytest.approx([-0.1 * math.log(0.1), -0.5 * math.log(0.5)])
