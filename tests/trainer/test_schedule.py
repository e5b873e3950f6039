"""Learning rates by hand."""

import pytest

from madpo.trainer.config import OptimConfig
from madpo.trainer.schedule import learning_rate


def rates(total: int, **optim) -> list[float]:
    return [learning_rate(OptimConfig(lr=1.0, **optim), step, total) for step in range(total)]


def test_warm_up_starts_above_zero_and_reaches_the_rate():
    assert rates(5, lr_scheduler_type="constant", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_warm_up_as_a_share_of_all_steps():
    assert rates(4, lr_scheduler_type="constant", warmup_ratio=0.5) == [0.5, 1.0, 1.0, 1.0]


def test_linear_falls_to_zero_after_the_last_step():
    assert rates(4, lr_scheduler_type="linear") == [1.0, 0.75, 0.5, 0.25]


def test_cosine_by_hand():
    assert rates(4) == pytest.approx([1.0, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5])
    assert rates(6, warmup_steps=2)[2:] == pytest.approx(rates(4))
