"""Sums over the tokens of completions."""

from __future__ import annotations

import torch

from madpo.trainer.objectives.scores import segment_sum


def test_segment_sum_keeps_empty_sequences_and_sums_in_float64():
    values = torch.tensor([1e8, 1.0, -1e8, 5.0], dtype=torch.float32)
    sums = segment_sum(values, torch.tensor([3, 0, 1]))
    assert sums.dtype == torch.float64
    assert sums.tolist() == [1.0, 0.0, 5.0]
