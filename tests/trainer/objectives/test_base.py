"""Objectives by hand arithmetic and by the golden values of the papers' code."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from score_cases import edge

from madpo.trainer.objectives import EdgeScores, build
from madpo.trainer.objectives.registry import OBJECTIVES


@pytest.mark.parametrize("document", ["docs/choosing.md", "docs/objectives.md"])
def test_every_objective_is_documented(document):
    text = (Path(__file__).parents[3] / document).read_text()
    assert [name for name in OBJECTIVES if f"`{name}`" not in text] == []


def test_every_parameter_is_documented():
    text = (Path(__file__).parents[3] / "docs/objectives.md").read_text()
    for name, entry in OBJECTIVES.items():
        fields = entry.params.model_fields.items()
        names = {field.serialization_alias or key for key, field in fields} - {"loss_type"}
        assert [key for key in names if f"`{key}`" not in text and f"`{key}: " not in text] == [], name


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


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("madop", {}, "unknown objective 'madop', did you mean 'madpo'"),
        ("madpo", {"c_min": 1.0}, r"madpo: c_min: expected a number above 0 and below 1 or null, got 1.0$"),
        ("madpo", {"temperature": 1.0}, "madpo: temperature: unknown parameter; known here: ablation, beta"),
        (
            "cdpo",
            {"label_smoothing": 0.5},
            "label_smoothing: expected .* of at least 0 and below 0.5, got 0.5",
        ),
        ("bdpo", {"lam": 1.0}, "lam: expected a number above 0 and below 1, got 1.0"),
        ("f_dpo", {"divergence": "alpha", "alpha": 1.0}, "set divergence: reverse_kl"),
        ("dpo", {"beta": 0.0}, "beta: expected a number above 0, got 0.0"),
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
