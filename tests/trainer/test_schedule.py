"""Learning rates and the length of a run, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import make_config

from madpo.trainer.config.schema import Config
from madpo.trainer.config.train import OptimConfig, TrainConfig
from madpo.trainer.schedule import learning_rate, logging_steps, run_length


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


def test_a_share_of_the_steps_is_rounded_up():
    """0.1 of 15 steps are 2; of a run so short that it is less than one step, one."""
    assert rates(15, lr_scheduler_type="constant", warmup_ratio=0.1)[:3] == [0.5, 1.0, 1.0]
    assert rates(3, lr_scheduler_type="constant", warmup_ratio=0.01) == [1.0, 1.0, 1.0]
    assert rates(4, lr_scheduler_type="linear", warmup_ratio=0.01) == pytest.approx([1, 1, 2 / 3, 1 / 3])


def test_the_decay_begins_after_the_warm_up_and_ends_after_the_last_step():
    assert rates(6, lr_scheduler_type="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(3, lr_scheduler_type="linear", warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0])
    # A warm-up longer than the run is cut off by its end.
    assert rates(2, warmup_steps=4) == [0.25, 0.5]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_rates_are_in_proportion_to_the_peak(kind):
    optim = OptimConfig(lr=3e-5, lr_scheduler_type=kind, warmup_steps=2)
    got = [learning_rate(optim, step, 7) for step in range(7)]
    assert got == pytest.approx([3e-5 * rate for rate in rates(7, lr_scheduler_type=kind, warmup_steps=2)])


def test_a_rate_depends_on_the_step_alone_also_past_the_end():
    """A stage that asks for the step after the last gets the end of the decay."""
    for kind, want in (("constant", 1.0), ("linear", 0.0), ("cosine", 0.0)):
        assert learning_rate(
            OptimConfig.model_validate({"lr": 1.0, "lr_scheduler_type": kind}), 4, 4
        ) == pytest.approx(want)


def config_with(**train: Any) -> Config:
    return make_config(
        Path("unused"),
        {"model": {"model_name_or_path": "m"}, "data": {"dataset_name": "d.jsonl"}, "train": train},
    )


@pytest.mark.parametrize(
    ("epochs", "num_groups", "size", "groups", "steps"),
    [
        (0.07, 100, 1, 7, 7),  # which in floating point are 7.000000000000001
        (0.07, 100, 8, 7, 1),
        (1.0, 16, 8, 16, 2),
        (1.0, 17, 8, 17, 3),
        (2.5, 5, 4, 13, 4),
        (0.001, 5, 4, 1, 1),
        (3.0, 7, 21, 21, 1),
    ],
)
def test_how_long_a_run_is_by_its_epochs(epochs, num_groups, size, groups, steps):
    """Parts of a group and of a step count as whole ones."""
    plan = run_length(config_with(num_train_epochs=epochs, global_batch_size=size), num_groups)
    assert (plan.total_groups, plan.total_steps) == (groups, steps)


def test_how_long_a_run_is_by_its_steps():
    config = config_with(num_train_epochs=9.0, max_steps=3, global_batch_size=7)
    for num_groups in (None, 5, 100):  # of a stream it is not known
        plan = run_length(config, num_groups)
        assert (plan.total_groups, plan.total_steps) == (21, 3)


@pytest.mark.parametrize(
    ("steps", "every"), [(1, 1), (19, 1), (39, 1), (40, 2), (199, 9), (200, 10), (10**6, 10)]
)
def test_a_run_has_twenty_lines_where_it_has_the_steps_and_a_line_in_ten_steps(steps, every):
    assert logging_steps(TrainConfig(), steps) == every
    assert logging_steps(TrainConfig(logging_steps=50), steps) == 50
