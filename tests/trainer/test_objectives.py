"""Objectives by hand arithmetic, by the golden values of the papers' code, and by gradcheck."""

import math

import pytest
import torch

from madpo.kernels.edge_loss import edge_loss_ref
from madpo.trainer.objectives.base import Item, MarginWeight, Scored, segment_sum
from madpo.trainer.objectives.madpo import MADPOParams
from madpo.trainer.objectives.registry import OBJECTIVES


def scored(
    token_logps: torch.Tensor, ref: torch.Tensor | None, lengths: list[int], margin: float = 0.0
) -> Scored:
    edges = torch.arange(0, len(lengths), 2)
    return Scored(
        token_logps,
        ref,
        torch.tensor(lengths),
        edges,
        edges + 1,
        torch.full((len(edges),), margin, dtype=torch.float64),
    )


@pytest.fixture
def example() -> Scored:
    """log pi = -12 and -15, log pi_ref = -12.5 and -14.2: log-ratios 0.5 and -0.8, D = 1.3."""
    policy = torch.tensor([-10.0, -2.0, -15.0], dtype=torch.float64)
    reference = torch.tensor([-12.5, 0.0, -14.2], dtype=torch.float64)
    return scored(policy, reference, [2, 1], margin=0.5)


def test_dpo_golden_value(example):
    entry = OBJECTIVES["dpo"]
    loss = entry.function(example, entry.params.model_validate({"beta": 0.1})).losses
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(0.6302581947, abs=1e-10)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.13)), abs=1e-14)


def test_dpo_by_hand_is_ln2_when_policy_is_reference():
    logps = torch.randn(6, dtype=torch.float64)
    entry = OBJECTIVES["dpo"]
    loss = entry.function(scored(logps, logps.clone(), [2, 1, 3, 0]), entry.params()).losses
    assert loss.tolist() == [math.log(2)] * 2


GOLDEN_WEIGHTS = [
    (
        {"c_max": 2, "c_min": 0.5, "steepness": 1, "tau": 2},
        {
            -5: 1,
            -2: 1,
            -1: 0.7569028941,
            -0.5: 0.8390794368,
            0: 1,
            0.5: 1.0976032554,
            1: 1.0894304275,
            3: 0.9449883273,
            5: 0.9422725963,
            20: 0.9999546042,
        },
    ),
    (
        {"c_max": 4, "c_min": 0.25, "steepness": 1, "tau": 7},
        {
            -10: 1,
            -5: 0.0002230718,
            -1: 0.0693391020,
            -0.1: 0.8455927018,
            0.1: 1.1397135010,
            0.5: 1.4131288472,
            1: 1.3423710111,
            3: 1.0497731664,
            7: 1,
            10: 0.9508247077,
            20: 0.9933074329,
        },
    ),
]


@pytest.mark.parametrize("parameters, golden", GOLDEN_WEIGHTS, ids=["c2-tau2", "c4-tau7"])
def test_madpo_weight_golden_values(parameters, golden):
    margins = torch.tensor(list(golden), dtype=torch.float64)
    weights = MarginWeight(**parameters)(margins)
    torch.testing.assert_close(
        weights, torch.tensor(list(golden.values()), dtype=torch.float64), atol=1e-9, rtol=0
    )


def test_madpo_weight_by_hand():
    """c(1) at c_max 4, c_min 1/4, tau 7: 0.25 + 3.75 / (1 + 4 e^-6) = 3.96318; w = s(c) / s(1)."""
    c = 0.25 + 3.75 / (1 + 4 * math.exp(-6))
    by_hand = (1 / (1 + math.exp(-c))) / (1 / (1 + math.exp(-1)))
    got = MarginWeight(4, 0.25, 1, 7)(torch.tensor([1.0], dtype=torch.float64))
    assert got.item() == pytest.approx(by_hand, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_madpo_weight_stays_finite_and_bounded_for_extreme_margins(dtype):
    margins = torch.tensor([-1e4, -200.0, -103.5, -7.0, 0.0, 7.0, 200.0, 1e4], dtype=dtype)
    weights = MarginWeight(4, 0.25, 1, 7)(margins)
    assert weights.isfinite().all()
    assert ((weights > 0) & (weights < 2)).all()
    assert weights[:4].tolist() == [1, 1, 1, 1]
    # A cap below the extreme margins, so that the ratio itself is formed there.
    assert MarginWeight(4, 0.25, 1, 2e4)(margins).isfinite().all()


def test_madpo_is_the_weighted_dpo_loss_and_reports_its_weight(example):
    madpo, dpo = OBJECTIVES["madpo"], OBJECTIVES["dpo"]
    outcome = madpo.function(example, madpo.params())
    plain = dpo.function(example, dpo.params()).losses
    assert outcome.stats["madpo/weight"].item() == pytest.approx(1.4131288472, abs=1e-9)
    assert outcome.losses.item() == pytest.approx(1.4131288472 * plain.item(), abs=1e-9)


def test_madpo_margin_scale_multiplies_the_margin(example):
    entry = OBJECTIVES["madpo"]
    outcome = entry.function(example, entry.params.model_validate({"margin_scale": 6}))
    assert outcome.stats["madpo/weight"].item() == pytest.approx(1.0497731664, abs=1e-9)


def test_madpo_parameters():
    assert MADPOParams().c_min == 0.25
    assert MADPOParams.model_validate({"lambda": 2.0}).steepness == 2.0
    for bad in ({"c_max": 1.0}, {"c_min": 1.0}, {"tau": 0.0}, {"lambda": 0.0}, {"beta": math.inf}):
        with pytest.raises(ValueError):
            MADPOParams.model_validate(bad)


def test_nll_is_one_loss_per_token():
    logps = torch.tensor([-1.0, -2.0, -3.0])
    entry = OBJECTIVES["nll"]
    assert entry.item is Item.TOKEN
    assert entry.function(scored(logps, None, [3]), entry.params()).losses.tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_right_and_stop_at_the_reference(name):
    entry = OBJECTIVES[name]
    reference = torch.randn(9, dtype=torch.float64, requires_grad=True)
    leaf = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def loss(logps: torch.Tensor) -> torch.Tensor:
        ref = reference.detach() if entry.needs_reference else None
        return entry.function(scored(logps, ref, [3, 1, 0, 5], margin=0.7), entry.params()).losses.sum()

    assert torch.autograd.gradcheck(loss, leaf)


def test_segment_sum_keeps_empty_sequences_and_sums_in_float64():
    values = torch.tensor([1e8, 1.0, -1e8, 5.0], dtype=torch.float32)
    sums = segment_sum(values, torch.tensor([3, 0, 1]))
    assert sums.dtype == torch.float64
    assert sums.tolist() == [1.0, 0.0, 5.0]


@pytest.mark.parametrize("name", [name for name, entry in OBJECTIVES.items() if entry.epilogue])
def test_what_the_kernels_form_is_what_the_objective_says(name):
    """The objective as data for the kernels, against the objective as a function."""
    entry = OBJECTIVES[name]
    lengths = torch.tensor([3, 1, 0, 5, 2, 4])
    tokens = torch.randn(2, 15, dtype=torch.float64) * 3
    margins = torch.tensor([-7.5, -0.5, 8.0], dtype=torch.float64)
    scored = Scored(tokens[0], tokens[1], lengths, torch.tensor([0, 3, 4]), torch.tensor([1, 2, 5]), margins)
    params = entry.params()
    assert entry.epilogue is not None
    got = edge_loss_ref(
        scored.logps,
        scored.ref_logps,
        lengths,
        scored.winners,
        scored.losers,
        entry.epilogue(margins, params),
    )
    torch.testing.assert_close(got, entry.function(scored, params).losses, rtol=1e-12, atol=1e-12)
