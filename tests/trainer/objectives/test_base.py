"""Objectives by hand arithmetic and by the golden values of the papers' code."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from madpo.trainer.objectives import EdgeScores, build
from madpo.trainer.objectives.base import Item, MarginWeight
from madpo.trainer.objectives.build import as_one_objective
from madpo.trainer.objectives.madpo import MADPOParams
from madpo.trainer.objectives.registry import OBJECTIVES
from madpo.trainer.objectives.scores import Scored, segment_sum


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
        torch.tensor([1, -1] * len(lengths))[: len(lengths)],
    )


@pytest.fixture
def example() -> Scored:
    """log pi = -12 and -15, log pi_ref = -12.5 and -14.2: log-ratios 0.5 and -0.8, D = 1.3."""
    policy = torch.tensor([-10.0, -2.0, -15.0], dtype=torch.float64)
    reference = torch.tensor([-12.5, 0.0, -14.2], dtype=torch.float64)
    return scored(policy, reference, [2, 1], margin=0.5)


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
    outcome = madpo(example, madpo.params())
    plain = dpo(example, dpo.params()).losses
    assert outcome.stats["madpo/weight"].item() == pytest.approx(1.4131288472, abs=1e-9)
    assert outcome.losses.item() == pytest.approx(1.4131288472 * plain.item(), abs=1e-9)


def test_madpo_margin_scale_multiplies_the_margin(example):
    entry = OBJECTIVES["madpo"]
    outcome = entry(example, entry.params.model_validate({"margin_scale": 6}))
    assert outcome.stats["madpo/weight"].item() == pytest.approx(1.0497731664, abs=1e-9)


def test_madpo_parameters():
    assert MADPOParams().c_min == 0.25
    assert MADPOParams.model_validate({"lambda": 2.0}).steepness == 2.0
    for bad in ({"c_max": 1.0}, {"c_min": 1.0}, {"tau": 0.0}, {"lambda": 0.0}, {"beta": math.inf}):
        with pytest.raises(ValueError):
            MADPOParams.model_validate(bad)


@pytest.mark.parametrize("document", ["README.md", "docs/objectives.md"])
def test_every_objective_is_documented(document):
    text = (Path(__file__).parents[3] / document).read_text()
    assert [name for name in OBJECTIVES if f"`{name}`" not in text] == []


def test_every_parameter_is_documented():
    text = (Path(__file__).parents[3] / "docs/objectives.md").read_text()
    for name, entry in OBJECTIVES.items():
        fields = entry.params.model_fields.items()
        names = {field.serialization_alias or key for key, field in fields} - {"loss_type"}
        assert [key for key in names if f"`{key}`" not in text and f"`{key}: " not in text] == [], name


def test_nll_is_one_loss_per_token():
    logps = torch.tensor([-1.0, -2.0, -3.0])
    entry = OBJECTIVES["nll"]
    assert entry.item is Item.TOKEN
    assert entry(scored(logps, None, [3]), entry.params()).losses.tolist() == [1, 2, 3]


def test_segment_sum_keeps_empty_sequences_and_sums_in_float64():
    values = torch.tensor([1e8, 1.0, -1e8, 5.0], dtype=torch.float32)
    sums = segment_sum(values, torch.tensor([3, 0, 1]))
    assert sums.dtype == torch.float64
    assert sums.tolist() == [1.0, 0.0, 5.0]


GOLDEN = [
    ("dpo", {}, 0.6302581947),
    ("sigmoid", {}, 0.6302581947),
    ("cdpo", {"eps": 0.1}, 0.6432581947),
    ("robust", {"label_smoothing": 0.1}, 0.6140081947),
    ("hinge", {}, 0.87),
    ("ipo", {"average": False}, 13.69),
    ("ipo", {"average": True}, 23.8469444444),
    ("slic_hf", {"delta": 1.0, "lam": 0.1}, 1.2),
    ("simpo", {"beta": 2.0, "gamma": 1.0}, 1.2411538747),
    ("cpo", {"beta": 0.1, "alpha": 1.0}, 1.7543552445),
    ("orpo", {"lam": 0.1}, 1.2658372254),
    ("dpo_nll", {"alpha": 1.0}, 1.8302581947),
    ("cal_dpo", {"beta": 0.1}, 19.1860084538),
    ("dpop", {"lam": 5.0}, 0.6302581947),
    ("exo_pair", {"beta": 0.1, "eps": 1e-3}, 2.5391848191),
    ("nca_pair", {"beta": 0.1}, 1.3546629557),
    ("bco_pair", {"beta": 0.1}, 1.3224066153),
    ("sppo_hard", {"beta": 0.1}, 37.89),
    ("apo_zero", {}, 0.9675132634),
    ("apo_down", {}, 0.9800430901),
    ("discopop", {"beta": 0.1, "tau": 0.05}, 0.8609603559),
    ("odpo", {"alpha": 1.0}, 1.013849604),
    ("bdpo", {"lam": 0.5}, 0.6528893177),
    ("bpo", {"alpha": 1.0}, 0.668459648),
    ("dpo_shift", {"lam": 0.75}, 0.6396589186),
    ("r_dpo", {"alpha": 0.02}, 0.649159339),
    ("f_dpo", {"divergence": "reverse_kl"}, 0.6302581947),
]


def edge(chosen: float = -12.0, dtype=torch.float64) -> EdgeScores:
    """n_w = 10, n_l = 12; a = 0.5, b = -0.8, D = 1.3 unless `chosen` says otherwise; margin 2."""
    won, lost, ref_won, ref_lost, margin = torch.tensor(
        [[chosen], [-15.0], [-12.5], [-14.2], [2.0]], dtype=dtype
    )
    return EdgeScores(won, lost, ref_won, ref_lost, torch.tensor([10]), torch.tensor([12]), margin)


@pytest.mark.parametrize("name, parameters, golden", GOLDEN, ids=[f"{n}-{p}" for n, p, _ in GOLDEN])
def test_golden_values(name, parameters, golden):
    """One edge, evaluated independently in float64."""
    assert build(name, **parameters)(edge()).item() == pytest.approx(golden, abs=2e-10)
    assert build(name, **parameters)(edge(dtype=torch.float32)).item() == pytest.approx(golden, rel=1e-5)


def test_more_golden_values():
    assert build("dpop", lam=5.0)(edge(-13.0)).item() == pytest.approx(0.809185019, abs=1e-9)
    constant = build("constant_margin", margin=math.log(2.0))(edge())
    assert constant.item() == pytest.approx(build("odpo")(edge()).item(), abs=1e-12)
    assert build("rso", beta=0.1)(edge()).item() == pytest.approx(0.87)
    assert build("cal_dpo_hinge", tau=1.0)(edge()).item() == pytest.approx(0.6302581947 + 0.95, abs=1e-9)
    normed = build("sigmoid_norm", beta=5.0)(edge()).item()
    assert normed == pytest.approx(math.log1p(math.exp(-5 * (0.5 / 10 + 0.8 / 12))), abs=1e-12)
    by_hand = math.log1p(math.exp(-(2 * (-1.2 + 1.25) - 1))) + 1.2
    assert build("cpo_simpo", beta=2.0, gamma=1.0)(edge()).item() == pytest.approx(by_hand, abs=1e-12)
    simpo = build("simpo", beta=2.5, gamma=0.25)(edge()).item()
    assert build("alphapo", alpha=0.0)(edge()).item() == pytest.approx(simpo, abs=1e-12)
    assert build("alphapo", alpha=1e-6)(edge()).item() == pytest.approx(simpo, abs=1e-5)
    p = 1 / (1 + math.exp(-2.2))
    mmpo = p * math.log1p(math.exp(-0.13)) + (1 - p) * math.log1p(math.exp(0.13))
    assert build("mmpo")(edge()).item() == pytest.approx(mmpo, abs=1e-12)


def test_mixdpo_routes_by_the_margin():
    """The margin of the edge is 2: easy below a threshold of 2, which is not smaller, difficult above."""
    for threshold in (0.5, 2.0):
        easy = build("mixdpo", beta=0.1, threshold=threshold)(edge()).item()
        assert easy == pytest.approx(0.6432581947, abs=1e-9)
    assert build("mixdpo", base="simpo").needs == {"margins", "lengths"}
    assert build("mixdpo", threshold=2.1)(edge()).item() == pytest.approx(1.2)
    assert build("mixdpo", base="ipo", beta=0.1)(edge()).item() == pytest.approx(13.69)
    simpo = build("mixdpo", base="simpo", beta=2.0, gamma=1.0)(edge()).item()
    assert simpo == pytest.approx(1.2411538747, abs=1e-9)


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


def test_ties_by_hand():
    """The three outcomes of two completions have probabilities that sum to one; D is 1.3."""
    scores = edge()
    flipped = EdgeScores(
        scores.rejected_logps, scores.chosen_logps, scores.ref_rejected_logps, scores.ref_chosen_logps,
        margins=scores.margins,
    )  # fmt: skip
    win, loss = (build("todo", theta=0.7)(x).item() for x in (scores, flipped))
    tie = build("todo", theta=0.7, tie_margin=2.0)(scores).item()
    assert win == pytest.approx(math.log1p(math.exp(-(0.13 - 0.7))))
    assert sum(math.exp(-x) for x in (win, loss, tie)) == pytest.approx(1.0)
    by_hand = math.log((1 + math.exp(0.83)) * (1 + math.exp(0.57)) / (math.exp(1.4) - 1))
    assert tie == pytest.approx(by_hand)


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
    slope = 0.1 * 0.5 / (1 + math.exp(z))
    assert torch.autograd.grad(losses.sum(), kl)[0].tolist() == pytest.approx([0, 0, slope])
    first = build("tdpo", alpha=1.0, stop_gradient=False)(scores)
    slope = 0.1 / (1 + math.exp(0.1 * (1.3 - 1.25)))
    assert torch.autograd.grad(first.sum(), kl)[0].tolist() == pytest.approx([-slope, -slope, slope])


def test_anchors_by_hand():
    """Scores 2 and -0.5, reference 1 and 0.25: D = 1.75."""
    scores = EdgeScores(*torch.tensor([[2.0], [-0.5], [1.0], [0.25]], dtype=torch.float64).unbind())
    base = math.log1p(math.exp(-0.1 * 1.75))

    def anchor(**parameters):
        return build("anchored_dpo", **parameters)(scores).item() - base

    assert anchor(anchor="linear") == pytest.approx(-3.25)
    assert anchor(anchor="lse", alpha=0.5) == pytest.approx(0.5 * math.log(math.exp(-3) + math.exp(-0.25)))
    assert anchor(anchor="hinge", tau=2.5) == pytest.approx(0.5 + 2.0)


@pytest.mark.parametrize(
    "divergence, g",
    [
        ("forward_kl", lambda x: -math.exp(-x)),
        ("js", lambda x: -math.log1p(math.exp(-x))),
        ("alpha", lambda x: math.exp(-0.5 * x) / -0.5),
    ],
)
def test_divergences_by_hand(divergence, g):
    want = math.log1p(math.exp(-0.1 * (g(0.5) - g(-0.8))))
    assert build("f_dpo", divergence=divergence)(edge()).item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_divergences_never_overflow(divergence):
    ratios = torch.tensor([-900.0, -420.0, 0.0, 900.0], requires_grad=True)
    zero = torch.zeros(4)
    losses = build("f_dpo", divergence=divergence)(EdgeScores(ratios, ratios.detach().flip(0), zero, zero))
    losses.sum().backward()
    assert losses.isfinite().all() and ratios.grad is not None and ratios.grad.isfinite().all()


def test_madpo_ablations_clamp_the_coefficient():
    scores = edge()  # margin 2: c(2) > 1
    full, amplify, regularise = (
        build("madpo", ablation=kind)(scores).item() for kind in (None, "amplify", "regularise")
    )
    assert amplify == full != regularise
    assert regularise == pytest.approx(0.6302581947, abs=1e-9)  # c = 1 there: plain DPO


@pytest.mark.parametrize("name", [name for name, entry in OBJECTIVES.items() if entry.view is EdgeScores])
def test_extreme_scores_stay_finite(name):
    """Log-ratios of +-600 nats, in float32: no overflow in loss or gradient."""
    for sign in (1.0, -1.0):
        chosen = torch.tensor([-900.0 + 600 * sign], requires_grad=True)
        rejected = torch.tensor([-900.0 - 600 * sign], requires_grad=True)
        middle, count = torch.tensor([-900.0]), torch.tensor([300])
        scores = EdgeScores(chosen, rejected, middle, middle, count, count, torch.tensor([1.0]))
        loss = build(name)(scores)
        loss.sum().backward()
        assert loss.isfinite().all() and chosen.grad is not None and chosen.grad.isfinite().all()


def test_functions_of_probability_by_hand():
    logps = torch.tensor([math.log(0.1), math.log(0.5)], dtype=torch.float64)
    tokens = scored(logps, None, [2])

    def losses(name, **parameters):
        return build(name, **parameters)(tokens).tolist()

    assert losses("f_alpha", alpha=1.0) == pytest.approx([0.9, 0.5])
    assert losses("f_alpha", alpha=0.0) == pytest.approx([-math.log(0.1), -math.log(0.5)])
    assert losses("f_alpha", alpha=1e-5) == pytest.approx([-math.log(0.1), -math.log(0.5)], rel=1e-4)
    assert losses("f_alpha", alpha=10.0) == pytest.approx([(1 - 0.1**10) / 10, (1 - 0.5**10) / 10])
    assert losses("thresholded_nll", threshold=0.2) == pytest.approx([0.0, -math.log(0.5)])
    assert losses("thresholded_nll", keep="below", loss="linear") == pytest.approx([0.9, 0.0])
    assert losses("dft") == pytest.approx([-0.1 * math.log(0.1), -0.5 * math.log(0.5)])


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("madop", {}, "unknown objective 'madop', did you mean 'madpo'"),
        ("madpo", {"c_min": 1.0}, r"madpo: c_min: .*less than 1"),
        ("madpo", {"temperature": 1.0}, "madpo: temperature: Extra inputs"),
        ("cdpo", {"label_smoothing": 0.5}, "label_smoothing: .*less than 0.5"),
        ("bdpo", {"lam": 1.0}, "less than 1"),
        ("f_dpo", {"divergence": "alpha", "alpha": 1.0}, "set divergence: reverse_kl"),
        ("dpo", {"beta": 0.0}, "greater than 0"),
    ],
)
def test_unknown_names_and_values_out_of_range_are_refused(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        build(name, **parameters)


def test_what_is_missing_is_named():
    scores = EdgeScores(torch.zeros(1), torch.zeros(1))
    assert build("madpo").needs == {"reference", "margins"}
    assert build("simpo").needs == {"lengths"}
    with pytest.raises(ValueError, match="simpo needs chosen_lengths"):
        build("simpo")(scores)
    with pytest.raises(ValueError, match="dpo needs ref_chosen_logps"):
        build("dpo")(scores)
    with pytest.raises(ValueError, match="nll takes Scored, got EdgeScores"):
        build("nll")(scores)


def test_an_objective_from_another_package(tmp_path):
    """Announced by an entry point, it is known to `build` and to the config."""
    (tmp_path / "elsewhere.py").write_text(
        "from typing import Literal\n"
        "from madpo.trainer.objectives.base import Params, objective\n"
        "class TripleParams(Params):\n"
        "    loss_type: Literal['triple'] = 'triple'\n"
        "    beta: float = 0.1\n"
        "@objective(TripleParams, {'reference'})\n"
        "def triple(scores, params):\n"
        "    return 3 * params.beta * scores.deltas\n"
    )
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[madpo.objectives]\ntriple = elsewhere\n")
    config = tmp_path / "c.yaml"
    config.write_text(
        "output_dir: o\nmodel: {model_name_or_path: m}\ndata: {dataset_name: d.jsonl}\n"
        "objective: {loss_type: triple, beta: 0.5}\n"
    )
    code = (
        "import torch; from madpo.trainer.config.schema import load; from madpo.trainer.objectives import *\n"
        f"print(load({str(config)!r}).objective.beta)\n"
        "z = torch.zeros(1); print(build('triple', beta=2.0)(EdgeScores(z + 1, z, z, z)).item())\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["0.5", "6.0"], done.stderr
