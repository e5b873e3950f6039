"""Other curves than the sigmoid's, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from score_cases import edge

from madpo.trainer.objectives import EdgeScores, build


@pytest.mark.parametrize(
    "divergence, g",
    [
        ("forward_kl", lambda x: -math.exp(-x)),
        ("js", lambda x: -math.log1p(math.exp(-x))),
        ("alpha", lambda x: math.exp(-0.5 * x) / -0.5),
    ],
)
def test_divergences_by_hand(divergence, g):
    want = math.log1p(math.exp(-0.1 * (g(0.5) - g(-0.8))))
    assert build("f_dpo", divergence=divergence)(edge()).item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_divergences_never_overflow(divergence):
    ratios = torch.tensor([-900.0, -420.0, 0.0, 900.0], requires_grad=True)
    zero = torch.zeros(4)
    losses = build("f_dpo", divergence=divergence)(EdgeScores(ratios, ratios.detach().flip(0), zero, zero))
    losses.sum().backward()
    assert losses.isfinite().all() and ratios.grad is not None and ratios.grad.isfinite().all()
