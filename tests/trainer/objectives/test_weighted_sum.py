"""Sums of losses are the sums of their terms."""

from __future__ import annotations

import math

import pytest
from score_cases import edge

from madpo.trainer.objectives import build
from madpo.trainer.objectives.build import as_one_objective


def test_weighted_sums():
    """The default is MPO; needs and names come from the terms."""
    mpo = build("weighted_sum")
    assert mpo.needs == {"reference", "lengths"}
    assert mpo(edge()).item() == pytest.approx(0.8 * 0.6302581947 + 0.2 * 1.3224066153 + 1.2, abs=1e-9)
    terms = [{"loss_type": "simpo", "gamma": 1.0}, {"loss_type": "slic_hf"}]
    two = build("weighted_sum", terms=terms, loss_weights=[1.0, 0.5])
    assert two.needs == {"lengths"}
    assert two(edge()).item() == pytest.approx(1.2411538747 + 0.6, abs=1e-9)
    for wrong, message in (
        ({"terms": terms, "loss_weights": [1.0]}, "1 for 2 terms"),
        ({"terms": [{"loss_type": "nll"}], "loss_weights": [1.0]}, "nll is no objective of pairs"),
        ({"terms": [{"loss_type": "dpo", "beta": -1.0}], "loss_weights": [1.0]}, "dpo: beta"),
        (
            {"terms": [{"loss_type": "dpo"}, {"loss_type": "bradley_terry"}], "loss_weights": [1.0, 1.0]},
            "do not mix",
        ),
        ({"terms": [{"beta": 1.0}], "loss_weights": [1.0]}, "each needs a loss_type"),
    ):
        with pytest.raises(ValueError, match=message):
            build("weighted_sum", **wrong)


def test_two_terms_of_one_kind_are_two_in_the_log():
    terms = [{"loss_type": "dpo", "beta": 0.1}, {"loss_type": "dpo", "beta": 5.0}]
    outcome = build("weighted_sum", terms=terms, loss_weights=[1.0, 1.0]).outcome(edge())
    assert outcome.stats["loss/dpo"].item() == pytest.approx(0.6302581947)
    assert outcome.stats["loss/dpo_1"].item() == pytest.approx(math.log1p(math.exp(-6.5)))
    for term in ({"loss_type": ["dpo"]}, {"loss_type": 3}, {"loss_type": "dpo", "name": "simpo"}):
        with pytest.raises(ValueError):
            build("weighted_sum", terms=[term], loss_weights=[1.0])


def test_a_list_of_losses_is_a_weighted_sum():
    """TRL's spelling of MPO, parameters for those that have them."""
    block = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.1}
    ours = as_one_objective(block)
    assert ours.pop("loss_type") == "weighted_sum"
    assert build("weighted_sum", **ours)(edge()).item() == pytest.approx(build("weighted_sum")(edge()).item())
    assert as_one_objective({"loss_type": ["dpo", "orpo"], "lam": 0.5})["terms"][1] == {
        "loss_type": "orpo",
        "lam": 0.5,
    }
    with pytest.raises(ValueError, match="tau: none of sigmoid, sft has this parameter"):
        as_one_objective({"loss_type": ["sigmoid", "sft"], "tau": 1.0})
