"""MADPO by hand and by the golden values of its paper's code."""

from __future__ import annotations

import math

import pytest
import torch
from score_cases import edge

from madpo.trainer.objectives import build
from madpo.trainer.objectives.base import MarginWeight
from madpo.trainer.objectives.madpo import MADPOParams
from madpo.trainer.objectives.registry import OBJECTIVES

GOLDEN_WEIGHTS = [
    (
        {"c_max": 2, "c_min": 0.5, "lam": 1, "tau": 2},
        {
            -5: 1,
            -2: 1,
            -1: 0.7569028941,
            -0.5: 0.8390794368,
            0: 1,
            0.5: 1.0976032554,
            1: 1.0894304275,
            3: 0.9449883273,
            5: 0.9422725963,
            20: 0.9999546042,
        },
    ),
    (
        {"c_max": 4, "c_min": 0.25, "lam": 1, "tau": 7},
        {
            -10: 1,
            -5: 0.0002230718,
            -1: 0.0693391020,
            -0.1: 0.8455927018,
            0.1: 1.1397135010,
            0.5: 1.4131288472,
            1: 1.3423710111,
            3: 1.0497731664,
            7: 1,
            10: 0.9508247077,
            20: 0.9933074329,
        },
    ),
]


@pytest.mark.parametrize("parameters, golden", GOLDEN_WEIGHTS, ids=["c2-tau2", "c4-tau7"])
def test_madpo_weight_golden_values(parameters, golden):
    margins = torch.tensor(list(golden), dtype=torch.float64)
    weights = MarginWeight(**parameters)(margins)
    torch.testing.assert_close(
        weights, torch.tensor(list(golden.values()), dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_madpo_weight_by_hand():
    """c(1) at c_max 4, c_min 1/4, tau 7: 0.25 + 3.75 / (1 + 4 e^-6) = 3.96318; w = s(c) / s(1)."""
    c = 0.25 + 3.75 / (1 + 4 * math.exp(-6))
    by_hand = (1 / (1 + math.exp(-c))) / (1 / (1 + math.exp(-1)))
    got = MarginWeight(4, 0.25, 1, 7)(torch.tensor([1.0], dtype=torch.float64))
    assert got.item() == pytest.approx(by_hand, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_madpo_weight_stays_finite_and_bounded_for_extreme_margins(dtype):
    margins = torch.tensor([-1e4, -200.0, -103.5, -7.0, 0.0, 7.0, 200.0, 1e4], dtype=dtype)
    weights = MarginWeight(4, 0.25, 1, 7)(margins)
    assert weights.isfinite().all()
    assert ((weights > 0) & (weights < 2)).all()
    assert weights[:4].tolist() == [1, 1, 1, 1]
    # A cap below the extreme margins, so that the ratio itself is formed there.
    assert MarginWeight(4, 0.25, 1, 2e4)(margins).isfinite().all()


def test_madpo_is_the_weighted_dpo_loss_and_reports_its_weight(example):
    madpo, dpo = OBJECTIVES["madpo"], OBJECTIVES["dpo"]
    outcome = madpo(example, madpo.params())
    plain = dpo(example, dpo.params()).losses
    assert outcome.stats["madpo/weight"].item() == pytest.approx(1.4131288472, abs=1e-9)
    assert outcome.losses.item() == pytest.approx(1.4131288472 * plain.item(), abs=1e-9)


def test_madpo_margin_scale_multiplies_the_margin(example):
    entry = OBJECTIVES["madpo"]
    outcome = entry(example, entry.params.model_validate({"margin_scale": 6}))
    assert outcome.stats["madpo/weight"].item() == pytest.approx(1.0497731664, abs=1e-9)


def test_madpo_parameters():
    assert MADPOParams().c_min == 0.25
    assert MADPOParams.model_validate({"lambda": 2.0}).lam == 2.0
    for bad in ({"c_max": 1.0}, {"c_min": 1.0}, {"tau": 0.0}, {"lambda": 0.0}, {"beta": math.inf}):
        with pytest.raises(ValueError):
            MADPOParams.model_validate(bad)


def test_madpo_ablations_clamp_the_coefficient():
    scores = edge()  # margin 2: c(2) > 1
    full, amplify, regularise = (
        build("madpo", ablation=kind)(scores).item() for kind in (None, "amplify", "regularise")
    )
    assert amplify == full != regularise
    assert regularise == pytest.approx(0.6302581947, abs=1e-9)  # c = 1 there: plain DPO
