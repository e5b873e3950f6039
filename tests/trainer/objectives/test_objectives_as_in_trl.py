"""Our objectives against the losses of TRL, as closed forms from TRL's documentation and the papers.

TRL averages an NLL term over all tokens of a batch, we over pairs: such forms are TRL's for one pair.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from madpo.trainer.objectives import EdgeScores, build

Array = NDArray[np.float64]
Form = Callable[..., Array]


class Pairs(NamedTuple):
    """(E,) log-probs l and r of the policy and the reference, tokens n; w is chosen, l rejected."""

    l_w: Array
    l_l: Array
    r_w: Array
    r_l: Array
    n_w: Array
    n_l: Array

    @property
    def a(self) -> Array:
        return self.l_w - self.r_w

    @property
    def b(self) -> Array:
        return self.l_l - self.r_l

    @property
    def delta(self) -> Array:
        return self.a - self.b

    @property
    def means(self) -> tuple[Array, Array]:
        return self.l_w / self.n_w, self.l_l / self.n_l


def random_pairs(seed: int) -> tuple[EdgeScores, Pairs]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 300, (2, 500))
    logps = rng.uniform(-3.0, -0.05, lengths.shape) * lengths
    reference = logps + rng.normal(0.0, 5.0, lengths.shape)
    arrays = (*logps, *reference, *lengths)
    return EdgeScores(*map(torch.from_numpy, arrays)), Pairs(*arrays)


def nls(x: Array) -> Array:
    """Negative log sigmoid."""
    return np.logaddexp(0.0, -x)


def sigma(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def ipo(x: Pairs, beta: float, average: bool) -> Array:
    """arXiv 2310.12036, equation 17, expanded; per token in DPOTrainer, summed in OnlineDPOTrainer."""
    gap = x.a / x.n_w - x.b / x.n_l if average else x.delta
    return gap**2 - gap / beta + 0.25 / beta**2


def exo_pair(x: Pairs, beta: float, eps: float) -> Array:
    """arXiv 2402.00856, equation 16: KL of the softmax of the rewards from (1 - eps, eps)."""
    model = np.stack([sigma(beta * x.delta), sigma(-beta * x.delta)])
    return (model * (np.log(model) - np.log([[1 - eps], [eps]]))).sum(0)


def robust(x: Pairs, beta: float, label_smoothing: float) -> Array:
    """arXiv 2403.00409, unbiased estimate: ((1 - e) L(w, l) - e L(l, w)) / (1 - 2 e)."""
    clean, flipped = nls(beta * x.delta), nls(-beta * x.delta)
    return (clean - label_smoothing * (clean + flipped)) / (1 - 2 * label_smoothing)


def discopop(x: Pairs, beta: float, tau: float) -> Array:
    """arXiv 2406.08414, equation 5: log-ratio modulated mix of a logistic and an exponential loss."""
    z = beta * x.delta
    return sigma(-z / tau) * nls(z) + sigma(z / tau) * np.exp(-z)


def f_dpo(x: Pairs, beta: float, divergence: str, alpha: float = 0.5) -> Array:
    """arXiv 2309.16240: f'(u) in place of log u; the alpha of TRL (and ours) is 1 minus the paper's."""
    slopes: dict[str, Form] = {
        "reverse_kl": lambda u: np.log(u) + 1,
        "forward_kl": lambda u: -1 / u,
        "js": lambda u: np.log(2 * u / (1 + u)),
        "alpha": lambda u: (1 - u ** -(1 - alpha)) / (1 - alpha),
    }
    return nls(beta * (slopes[divergence](np.exp(x.a)) - slopes[divergence](np.exp(x.b))))


def mpo(x: Pairs, terms: list[dict[str, Any]], loss_weights: list[float]) -> Array:
    """dpo_trainer.md, "Multi-loss combinations"; arXiv 2411.10442. The terms are those of MPO below."""
    losses = nls(0.1 * x.delta), nls(0.1 * x.a) + nls(-0.1 * x.b), -x.means[0]
    return sum((w * loss for w, loss in zip(loss_weights, losses, strict=True)), np.zeros_like(x.a))


def simpo(x: Pairs, beta: float, gamma: float, alpha: float = 0.0) -> Array:
    """cpo_trainer.md, "CPO-SimPO"; without the NLL SimPO, arXiv 2405.14734, equation 6."""
    return nls(beta * x.means[0] - beta * x.means[1] - gamma) - alpha * x.means[0]


def alphapo(x: Pairs, beta: float, gamma: float, alpha: float) -> Array:
    """cpo_trainer.md, "AlphaPO"; arXiv 2501.03884: reward (1 - p^-alpha) / alpha, p per token."""
    p_w, p_l = map(np.exp, x.means)
    return nls(beta / alpha * (p_l**-alpha - p_w**-alpha) - gamma)


BETAS: list[dict[str, Any]] = [{"beta": 0.01}, {"beta": 0.1}, {"beta": 1.5}]
NOISE: list[dict[str, Any]] = [{"beta": 0.1, "label_smoothing": e} for e in (0.0, 0.1, 0.35)]
NLL: list[dict[str, Any]] = [{"beta": 0.1, "alpha": 1.0}, {"beta": 1.5, "alpha": 0.3}]
MARGIN: list[dict[str, Any]] = [{"beta": 2.0, "gamma": 0.5}, {"beta": 0.1, "gamma": 0.0}]
MPO = [{"loss_type": "dpo", "beta": 0.1}, {"loss_type": "bco_pair", "beta": 0.1}, {"loss_type": "chosen_nll"}]
DIVERGENCES: list[dict[str, Any]] = [
    *({"divergence": name} for name in ("reverse_kl", "forward_kl", "js")),
    *({"divergence": "alpha", "alpha": alpha} for alpha in (0.3, 0.5, 0.8, 1.5)),
]

TABLE: list[tuple[str, list[dict[str, Any]], Form]] = [
    # dpo_trainer.md: arXiv 2305.18290, equation 7; 2309.06657; cDPO (before 1.0); sigmoid_norm
    ("sigmoid", BETAS, lambda x, beta: nls(beta * x.delta)),
    ("hinge", BETAS, lambda x, beta: beta * np.clip(1 / beta - x.delta, 0, None)),
    ("cdpo", NOISE, lambda x, beta, label_smoothing: nls(beta * x.delta) + label_smoothing * beta * x.delta),
    ("sigmoid_norm", [*BETAS, {"beta": 10.0}], lambda x, beta: nls(beta * x.a / x.n_w - beta * x.b / x.n_l)),
    ("robust", NOISE, robust),
    ("ipo", [each | {"average": average} for each in BETAS for average in (True, False)], ipo),
    ("exo_pair", [{"beta": 0.1, "eps": 1e-3}, {"beta": 1.5, "eps": 0.2}], exo_pair),
    # arXiv 2402.05369; 2404.04656 without a reward shift; 2405.00675, equation 4.7, at win rates 1 and 0
    ("nca_pair", BETAS, lambda x, beta: nls(beta * x.a) + (nls(-beta * x.a) + nls(-beta * x.b)) / 2),
    ("bco_pair", BETAS, lambda x, beta: nls(beta * x.a) + nls(-beta * x.b)),
    ("sppo_hard", BETAS, lambda x, beta: (x.a - 1 / (2 * beta)) ** 2 + (x.b + 1 / (2 * beta)) ** 2),
    # arXiv 2408.06266, equations 7 and 8
    ("apo_zero", BETAS, lambda x, beta: sigma(-beta * x.a) + sigma(beta * x.b)),
    ("apo_down", BETAS, lambda x, beta: sigma(beta * x.a) + sigma(-beta * x.delta)),
    ("discopop", [{"beta": 0.05, "tau": 0.05}, {"beta": 0.1, "tau": 1.0}], discopop),
    ("f_dpo", [each | divergence for each in BETAS for divergence in DIVERGENCES], f_dpo),
    # "sft"; "sigmoid" and "sft", which is RPO, arXiv 2404.19733; MPO
    ("chosen_nll", [{"average": True}], lambda x, average: -x.means[0]),
    ("dpo_nll", NLL, lambda x, beta, alpha: nls(beta * x.delta) - alpha * x.means[0]),
    ("weighted_sum", [{"terms": MPO, "loss_weights": w} for w in ([0.8, 0.2, 1.0], [1.0, 2.0, 0.1])], mpo),
    # cpo_trainer.md: arXiv 2401.08417; "hinge" at beta 1 and cpo_alpha 0, 2305.10425
    ("cpo", NLL, lambda x, beta, alpha: nls(beta * x.l_w - beta * x.l_l) - alpha * x.means[0]),
    ("slic_hf", [{"delta": 1.0, "lam": 0.0}], lambda x, delta, lam: np.maximum(0, 1 + x.l_l - x.l_w)),
    ("simpo", MARGIN, simpo),
    ("cpo_simpo", [each | {"alpha": alpha} for each in MARGIN for alpha in (0.0, 0.3, 1.0)], simpo),
    ("alphapo", [each | {"alpha": alpha} for each in MARGIN for alpha in (-0.5, 0.25, 1.0)], alphapo),
]
CASES = [(name, given, form) for name, settings, form in TABLE for given in settings]


@pytest.mark.parametrize(("name", "given", "form"), CASES, ids=[case[0] for case in CASES])
def test_losses_equal_the_closed_form(name: str, given: dict[str, Any], form: Form) -> None:
    """To 1e-10; the absolute 1e-15 is for 1 - sigmoid of tiny losses."""
    scores, pairs = random_pairs(seed=0)
    losses = build(name, **given)(scores).numpy()
    np.testing.assert_allclose(losses, form(pairs, **given), rtol=1e-10, atol=1e-15)


def test_odds_ratio_of_orpo_equals_the_closed_form() -> None:
    """arXiv 2403.07691, equations 4 and 7, without the NLL: TRL's is over the prompt too."""
    scores, pairs = random_pairs(seed=0)
    odds_w, odds_l = (p / (1 - p) for p in map(np.exp, pairs.means))
    more, less = (build("orpo", lam=lam)(scores).numpy() for lam in (1.25, 0.25))
    np.testing.assert_allclose(more - less, np.log1p(odds_l / odds_w), rtol=1e-10, atol=1e-15)
