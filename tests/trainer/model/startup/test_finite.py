"""A weight that is NaN in a model's file, on ranks that share the weights out."""

from __future__ import annotations

import pytest
from harness import run_ranks
from safetensors.torch import load_file, save_file
from small_runs import changed, train

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("ranks, value", [(2, float("nan")), (1, float("inf"))])
def test_a_weight_that_is_not_finite_is_named_before_the_first_step(config, tmp_path, ranks, value):
    path = tmp_path / "start" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = value
    save_file(weights, path, metadata={"format": "pt"})
    run = changed(config, deepspeed={"zero_optimization": {}}) if ranks == 1 else config
    message = r"NotFiniteError: .*start: its weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN"
    with pytest.raises(AssertionError, match=message):
        run_ranks(ranks, train, run)
