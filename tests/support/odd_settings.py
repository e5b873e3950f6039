"""Every objective at parameters of which none is a default, and the second opinion on it there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import second_opinions
import second_opinions_of_steps
from facts import Array, Facts
from second_opinions_of_steps import Kept

from madpo.trainer.objectives.registry import OBJECTIVES

Settings = dict[str, Any]

ODD: dict[str, list[Settings]] = {
    "alpha_dpo": [{"beta": 1.7, "gamma": 0.6, "alpha": 0.45, "momentum": 0.7}],
    "alphapo": [{"beta": 1.3, "gamma": -0.4, "alpha": 0.6}],
    "amapo": [{"beta": 1.3}],
    "anchored_dpo": [
        {"beta": 0.3, "anchor": "linear", "alpha": 0.4, "tau": 6.5},
        {"beta": 0.3, "anchor": "lse", "alpha": 0.4, "tau": 6.5},
        {"beta": 0.3, "anchor": "hinge", "alpha": 0.4, "tau": 6.5},
    ],
    "aot": [{"beta": 0.3, "label_smoothing": 0.15}],
    "aot_unpaired": [{"beta": 0.3, "label_smoothing": 0.15}],
    "apo_down": [{"beta": 0.3}],
    "apo_zero": [{"beta": 0.3}],
    "apo_zero_unpaired": [{"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.9}],
    "bco_pair": [{"beta": 0.3, "delta": 0.45}],
    "bdpo": [{"beta": 0.3, "lam": 0.35}],
    "beta_dpo": [
        {"beta": 0.3, "alpha": 0.25, "drop": 0.4, "momentum": 0.6, "min_beta": 0.002},
        {"beta": 0.3, "alpha": 0.25, "drop": 0.4, "momentum": 0.6, "min_beta": 0.9},
    ],
    "bpo": [{"beta": 0.3, "alpha": 0.8}],
    "bradley_terry": [{"margin": True, "center_rewards_coefficient": 0.03}],
    "cal_dpo": [{"beta": 0.3, "weight": 0.8}],
    "cal_dpo_hinge": [{"beta": 0.3, "alpha": 0.4, "tau": 0.6}],
    "cdpo": [{"beta": 0.3, "label_smoothing": 0.25}],
    "chosen_nll": [{"average": False}],
    "constant_margin": [{"beta": 0.3, "margin": 0.4}],
    "cpo": [{"beta": 0.3, "alpha": 0.4, "average": False}],
    "cpo_simpo": [{"beta": 1.3, "gamma": 0.6, "alpha": 0.4, "average": False}],
    "dft": [{}],
    "discopop": [{"beta": 0.3, "tau": 0.4}],
    "dpo": [{"beta": 0.3}],
    "dpo_nll": [{"beta": 0.3, "alpha": 0.4, "average": False}],
    "dpo_shift": [{"beta": 0.3, "lam": 0.35}],
    "dpop": [{"beta": 0.3, "lam": 1.7}],
    "dr_dpo": [{"beta": 0.3, "beta_prime": 0.6}],
    "exo_pair": [{"beta": 0.3, "eps": 0.07}],
    "f_alpha": [{"alpha": 0.35}],
    "f_dpo": [
        {"beta": 0.3, "divergence": "forward_kl", "alpha": 0.7},
        {"beta": 0.3, "divergence": "js", "alpha": 0.7},
        {"beta": 0.3, "divergence": "alpha", "alpha": 0.7},
    ],
    "gamma_po": [
        {"beta": 1.3, "gamma": 0.7, "tau": 0.4, "base": "simpo"},
        {"beta": 0.3, "gamma": 0.7, "tau": 0.4, "base": "dpo"},
    ],
    "hinge": [{"beta": 0.3}],
    "ipo": [{"beta": 0.3, "average": False}, {"beta": 0.3, "average": True}],
    "kto": [{"beta": 0.3, "desirable_weight": 0.7, "undesirable_weight": 1.9}],
    "ld_dpo": [{"beta": 0.3, "alpha": 0.2}],
    "madpo": [
        {
            "beta": 0.3,
            "c_max": 3.0,
            "c_min": 0.6,
            "lam": 1.7,
            "tau": 1.5,
            "margin_scale": 0.7,
            "ablation": x,
        }
        for x in ("amplify", "regularise", None)
    ],
    "mixdpo": [
        {"beta": 0.3, "threshold": 0.9, "base": base, "label_smoothing": 0.25, "gamma": 0.6}
        for base in ("simpo", "ipo", "dpo")
    ],
    "mmpo": [{"beta": 0.3, "gamma": 0.6}],
    "nca_pair": [{"beta": 0.3}],
    "nll": [{}],
    "odpo": [{"beta": 0.3, "alpha": 0.4}],
    "orpo": [{"lam": 0.35}],
    "r_dpo": [{"beta": 0.3, "alpha": 0.07}],
    "robust": [{"beta": 0.3, "label_smoothing": 0.25}],
    "rso": [{"beta": 0.3}],
    "sigmoid_norm": [{"beta": 1.7}],
    "simpo": [{"beta": 1.3, "gamma": 0.6}],
    "slic_hf": [{"delta": 2.3, "lam": 0.35}],
    "sppo_hard": [{"beta": 0.3}],
    "tdpo": [
        {"beta": 0.3, "alpha": 0.8, "stop_gradient": True},
        {"beta": 0.3, "alpha": 0.8, "stop_gradient": False},
    ],
    "thresholded_nll": [
        {"threshold": 0.35, "keep": "above", "loss": "linear"},
        {"threshold": 0.35, "keep": "below", "loss": "log"},
    ],
    "todo": [{"beta": 0.3, "theta": 0.8, "tie_margin": 0.9}],
    "weighted_sum": [
        {
            "terms": [
                {"loss_type": "beta_dpo", "beta": 0.3, "alpha": 0.25, "momentum": 0.6},
                {"loss_type": "madpo", "beta": 0.3, "tau": 1.5},
                {"loss_type": "beta_dpo", "drop": 0.5},
            ],
            "loss_weights": [0.6, 1.7, 0.4],
        }
    ],
    "wpo": [{"beta": 0.3, "clamp": False}, {"beta": 0.3, "clamp": True}],
}
"""loss_type -> settings by the fields' names: no number is a default, and every choice is made in some."""

CASES = [(name, index) for name in sorted(ODD) for index in range(len(ODD[name]))]


def keys(name: str, settings: Settings) -> Settings:
    """The settings as a config has them."""
    fields = OBJECTIVES[name].params.model_fields
    return {fields[field].serialization_alias or field: value for field, value in settings.items()}


MPO = (
    {"loss_type": "dpo", "beta": 0.1},
    {"loss_type": "bco_pair", "beta": 0.1},
    {"loss_type": "chosen_nll"},
)


def weighted_sum(
    x: Facts, terms: tuple[dict[str, Any], ...] = MPO, loss_weights: tuple[float, ...] = (0.8, 0.2, 1.0)
) -> Kept:
    total, memory = np.zeros(len(x.chosen)), dict[str, list[float]]()
    for index, (term, weight) in enumerate(zip(terms, loss_weights, strict=True)):
        parameters = dict(term)
        mine = {key.split(" ", 1)[1]: v for key, v in x.memory.items() if key.startswith(f"{index} ")}
        constant = None if x.constant is None else replace(x.constant, memory=mine)
        losses, kept = opinion(
            parameters.pop("loss_type"), replace(x, memory=mine, constant=constant), parameters
        )
        total = total + weight * losses
        memory |= {f"{index} {key}": values for key, values in kept.items()}
    return total, memory


def second_opinion(name: str) -> Callable[..., Any]:
    """The function; raises AttributeError where nobody wrote one."""
    if name == "weighted_sum":
        return weighted_sum
    return getattr(second_opinions, name, None) or getattr(second_opinions_of_steps, name)


def opinion(name: str, x: Facts, parameters: dict[str, Any]) -> Kept:
    """The losses of `name` and what it remembers."""
    result = second_opinion(name)(x, **parameters)
    return result if isinstance(result, tuple) else (result, {})


def numeric_gradients(name: str, x: Facts, parameters: dict[str, Any]) -> tuple[Array, Array]:
    """Gradients (M,) of the sum of losses in each token's log-prob and each kl, by central differences."""

    def derivative(which: str, index: int) -> float:
        sums = []
        for step in (1e-4, -1e-4):
            moved = np.array(getattr(x, which))
            moved[index] += step
            sums.append(opinion(name, replace(x, **{which: moved}, constant=x), parameters)[0].sum())
        return (sums[0] - sums[1]) / 2e-4

    count = range(len(x.tokens))
    with_kl = name == "tdpo"
    of_kl = [derivative("kl", index) if with_kl else 0.0 for index in count]
    return np.array([derivative("tokens", index) for index in count]), np.array(of_kl)


def example(name: str) -> Facts:
    """Ten pairs of random tokens, in the middle of a run; for odpo with margins above 0, as it asks."""
    random = np.random.default_rng(3)
    pairs = 10
    lengths = random.integers(1, 8, 2 * pairs)
    count = int(lengths.sum())
    tokens = -random.uniform(0.02, 3.0, count)
    margins = random.normal(0.7, 2.0, pairs)
    memory = {
        "moments": [0.7, 1.9],
        "gaps": random.normal(0.3, 1.5, 300).tolist(),
        "0 moments": [0.4, 2.3],
        "2 moments": [-0.6, 1.2],
    }
    return Facts(
        tokens,
        tokens + random.normal(-0.15, 0.5, count),
        lengths,
        np.arange(0, 2 * pairs, 2),
        np.arange(1, 2 * pairs, 2),
        np.abs(margins) if name == "odpo" else margins,
        np.tile([1, -1, 0, -1, 1], 2 * pairs)[: 2 * pairs],
        -random.uniform(0.5, 3.0, count),
        random.uniform(0.0, 0.8, count),
        memory
        if OBJECTIVES[name].of(OBJECTIVES[name].params()).needs_batch or name == "weighted_sum"
        else {},
        (5, 11),
    )
