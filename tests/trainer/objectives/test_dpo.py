"""DPO by hand."""

from __future__ import annotations

import math

import pytest
import torch
from score_cases import scored

from madpo.trainer.objectives.registry import OBJECTIVES


def test_dpo_golden_value(example):
    entry = OBJECTIVES["dpo"]
    loss = entry(example, entry.params.model_validate({"beta": 0.1})).losses
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(0.6302581947, abs=1e-10)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.13)), abs=1e-14)


def test_dpo_by_hand_is_ln2_when_policy_is_reference():
    logps = torch.randn(6, dtype=torch.float64)
    entry = OBJECTIVES["dpo"]
    loss = entry(scored(logps, logps.clone(), [2, 1, 3, 0]), entry.params()).losses
    assert loss.tolist() == [math.log(2)] * 2
