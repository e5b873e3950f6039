"""One pair that many objectives are worked out for by hand."""

from __future__ import annotations

import pytest
import torch
from score_cases import scored

from madpo.trainer.objectives.scores import Scored


@pytest.fixture
def example() -> Scored:
    """log pi = -12 and -15, log pi_ref = -12.5 and -14.2: log-ratios 0.5 and -0.8, D = 1.3."""
    policy = torch.tensor([-10.0, -2.0, -15.0], dtype=torch.float64)
    reference = torch.tensor([-12.5, 0.0, -14.2], dtype=torch.float64)
    return scored(policy, reference, [2, 1], margin=0.5)
