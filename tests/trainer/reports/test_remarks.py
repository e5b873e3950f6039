"""What is unusual about a run is said before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import make_config

from madpo.trainer.config.schema import Config
from madpo.trainer.reports.remarks import remarks

BIG = (8_000_000_000, 8_000_000_000)
ADAPTER = (40_000_000, 8_000_000_000)


def config_with(rate: float, loss_type: str = "dpo", **train: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"model_name_or_path": "m"},
        "data": {"dataset_name": "d", "max_length": 64},
        "objective": {"loss_type": loss_type},
        "optim": {"lr": rate},
        "train": train,
    }
    return make_config(Path("there"), tree)


@pytest.mark.parametrize(
    ("rate", "loss_type", "parameters", "said"),
    [
        (1e-6, "dpo", BIG, None),
        (2e-5, "dpo", BIG, "optim.lr 2e-05 is high: about 1e-06 is usual for preferences with all weights"),
        (1.9e-5, "dpo", BIG, None),
        (2e-5, "dpo", ADAPTER, None),
        (1e-3, "dpo", (4_000_000, 4_000_000), None),  # a small model takes it
        (1e-6, "nll", BIG, "optim.lr 1e-06 is low: about 2e-05 is usual for supervised training with all"),
        (1e-6, "bradley_terry", ADAPTER, "about 0.0001 is usual for reward models with an adapter"),
    ],
)
def test_a_rate_far_from_the_usual_one_is_remarked_on(rate, loss_type, parameters, said):
    found = remarks(config_with(rate, loss_type), 100, parameters, None)
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_a_run_of_few_steps_is_remarked_on():
    assert remarks(config_with(1e-6), 20, BIG, None) == []
    (remark,) = remarks(config_with(1e-6), 4, BIG, None)
    assert remark.startswith("a short run: 4 steps of 8 groups; a smaller train.global_batch_size")
    (remark,) = remarks(config_with(1e-6, max_steps=1), 1, BIG, None)
    assert remark == "a short run: 1 step of 8 groups; train.max_steps=1 ends it"


def test_the_weights_of_the_pairs_are_said_and_also_that_they_are_all_alike():
    """A tau at the margins' upper end makes MADPO plain DPO, and the log alone does not show it."""
    config = config_with(1e-6, "madpo")
    spread = np.linspace(0.5, 2.5, 101)
    assert remarks(config, 100, BIG, spread) == ["weights of madpo: median 1.5, nine of ten from 0.6 to 2.4"]
    (remark,) = remarks(config, 100, BIG, 4 * spread)
    assert remark.endswith("from 2.4 to 9.6; their mean, 6, multiplies gradients as the learning rate does")
    for weight, rate in ((1.0, ""), (2.0, " at 2 times the learning rate")):
        (remark,) = remarks(config, 100, BIG, np.full(50, weight))
        assert remark == (
            f"weights of madpo: median {weight:g}, nine of ten from {weight:g} to {weight:g}; they do not "
            f"vary, so this is DPO{rate} (docs/tau.md)"
        )
    params: Any = config.objective
    far_below = params.weight(torch.linspace(-90, -30, 40, dtype=torch.float64)).numpy()
    assert "so this is DPO (" in remarks(config, 100, BIG, far_below)[0]
