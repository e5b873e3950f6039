"""Objectives of tokens, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from madpo.trainer.objectives import build


def test_ld_dpo_by_hand(example):
    """Chosen -10, -2 and rejected -15 against -12.5, 0 and -14.2: the shared length is one token."""
    head, tail = (-10 + 12.5) - (-15 + 14.2), -2.0
    for alpha in (0.0, 0.5, 1.0):
        want = math.log1p(math.exp(-0.1 * (head + alpha * tail)))
        assert build("ld_dpo", alpha=alpha)(example).item() == pytest.approx(want, abs=1e-12)
    assert build("ld_dpo", alpha=1.0)(example).item() == pytest.approx(0.6302581947, abs=1e-9)


def test_wpo_by_hand(example):
    """Weights exp(mean of log p - log sum p^2): -12 / 2 + 5 and -15 + 14.5, so e^-1 e^-0.5."""
    collisions = torch.tensor([-4.0, -6.0, -14.5], dtype=torch.float64)
    scores = replace(example, log_collisions=collisions, kl=collisions)
    weight = math.exp(-1.5)
    loss = math.log1p(math.exp(-0.1 * 1.3))
    assert build("wpo", beta=0.1)(scores).item() == pytest.approx(weight * loss, abs=1e-12)
    likely = replace(scores, log_collisions=collisions - 9)
    assert build("wpo", beta=0.1)(likely).item() == pytest.approx(loss, abs=1e-12)
    unclamped = build("wpo", beta=0.1, clamp=False)(likely).item()
    assert unclamped == pytest.approx(math.exp(16.5) * loss, rel=1e-12)


def test_tdpo_by_hand(example):
    """K_w = 0.5 + 0.25, K_l = 2; the second form has no gradient through K_w, the first has."""
    kl = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    scores = replace(example, kl=kl, log_collisions=kl)
    z = 0.1 * (1.3 - 0.5 * (2.0 - 0.75))
    losses = build("tdpo")(scores)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-z)), abs=1e-12)
    gradient = 0.1 * 0.5 / (1 + math.exp(z))
    assert torch.autograd.grad(losses.sum(), kl)[0].tolist() == pytest.approx([0, 0, gradient])
    first = build("tdpo", alpha=1.0, stop_gradient=False)(scores)
    gradient = 0.1 / (1 + math.exp(0.1 * (1.3 - 1.25)))
    assert torch.autograd.grad(first.sum(), kl)[0].tolist() == pytest.approx([-gradient, -gradient, gradient])
