"""Every objective a second time, in numpy and float64, from the papers and docs/objectives.md alone.

A function is called as its `loss_type`, takes what is known of a batch and every parameter by its field's
name, with the documented default, and returns one loss per item. What the formula holds constant (sg) is
taken from `x.sg`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from facts import Array, Facts, nls, sigmoid


def dpo(x: Facts, beta: float = 0.1) -> Array:
    return nls(beta * x.gap)


def cdpo(x: Facts, beta: float = 0.1, label_smoothing: float = 0.1) -> Array:
    return (1 - label_smoothing) * nls(beta * x.gap) + label_smoothing * nls(-beta * x.gap)


def robust(x: Facts, beta: float = 0.1, label_smoothing: float = 0.1) -> Array:
    kept, flipped = (1 - label_smoothing) * nls(beta * x.gap), label_smoothing * nls(-beta * x.gap)
    return (kept - flipped) / (1 - 2 * label_smoothing)


def sigmoid_norm(x: Facts, beta: float = 5.0) -> Array:
    return nls(beta * (x.a / x.n_w - x.b / x.n_l))


def ipo(x: Facts, beta: float = 0.1, average: bool = True) -> Array:
    gap = x.a / x.n_w - x.b / x.n_l if average else x.gap
    return (gap - 0.5 / beta) ** 2


def hinge(x: Facts, beta: float = 0.1) -> Array:
    return np.maximum(0, 1 - beta * x.gap)


def rso(x: Facts, beta: float = 0.05) -> Array:
    return np.maximum(0, 1 - beta * x.gap)


def madpo(
    x: Facts,
    beta: float = 0.1,
    c_max: float = 4.0,
    c_min: float | None = None,
    lam: float = 1.0,
    tau: float = 7.0,
    margin_scale: float = 1.0,
    ablation: str | None = None,
) -> Array:
    low, h = 1 / c_max if c_min is None else c_min, x.margins * margin_scale
    c = low + (c_max - low) / (1 + (c_max - 1) / (1 - low) * np.exp(lam * (np.abs(h) - tau)))
    if ablation is not None:
        c = np.maximum(c, 1) if ablation == "amplify" else np.minimum(c, 1)
    weight = np.where(h > -tau, sigmoid(c * h) / sigmoid(h), 1.0)
    return weight * nls(beta * x.gap)


def odpo(x: Facts, beta: float = 0.1, alpha: float = 1.0) -> Array:
    return nls(beta * x.gap - alpha * np.log(x.margins))


def constant_margin(x: Facts, beta: float = 0.1, margin: float = 1.0) -> Array:
    return nls(beta * x.gap - margin)


def mmpo(x: Facts, beta: float = 0.1, gamma: float = 1.1) -> Array:
    p = sigmoid(gamma * x.margins)
    return p * nls(beta * x.gap) + (1 - p) * nls(-beta * x.gap)


def r_dpo(x: Facts, beta: float = 0.1, alpha: float = 0.02) -> Array:
    return nls(beta * x.gap + alpha * (x.n_w - x.n_l))


def dpo_shift(x: Facts, beta: float = 0.1, lam: float = 0.75) -> Array:
    return nls(beta * (x.a - lam * x.b))


def dpop(x: Facts, beta: float = 0.1, lam: float = 5.0) -> Array:
    return nls(beta * (x.gap - lam * np.maximum(0, -x.a)))


def bdpo(x: Facts, beta: float = 0.1, lam: float = 0.5) -> Array:
    return nls(beta * (x.a - np.log(lam * np.exp(x.b) + 1 - lam)))


def bpo(x: Facts, beta: float = 0.1, alpha: float = 0.3) -> Array:
    return nls(beta * np.minimum(x.a, -alpha * x.b))


def dpo_nll(x: Facts, beta: float = 0.1, alpha: float = 1.0, average: bool = True) -> Array:
    return nls(beta * x.gap) + alpha * chosen_nll(x, average)


def chosen_nll(x: Facts, average: bool = True) -> Array:
    return -(x.u_w if average else x.l_w)


def cal_dpo(x: Facts, beta: float = 0.001, weight: float = 0.5) -> Array:
    return nls(x.gap) + weight * sppo_hard(x, beta)


def cal_dpo_hinge(x: Facts, beta: float = 0.1, alpha: float = 1.0, tau: float = 1.0) -> Array:
    return nls(beta * x.gap) + alpha * np.maximum(0, tau - beta * x.a)


def sppo_hard(x: Facts, beta: float = 0.001) -> Array:
    return (x.a - 1 / (2 * beta)) ** 2 + (x.b + 1 / (2 * beta)) ** 2


def mixdpo(
    x: Facts,
    beta: float = 0.01,
    threshold: float = 0.5,
    base: str = "dpo",
    label_smoothing: float = 0.1,
    gamma: float = 0.0,
) -> Array:
    easy = {
        "dpo": lambda: cdpo(x, beta, label_smoothing),
        "simpo": lambda: simpo(x, beta, gamma),
        "ipo": lambda: ipo(x, beta, average=False),
    }[base]()
    return np.where(x.margins < threshold, -x.u_w, easy)


def todo(x: Facts, beta: float = 0.1, theta: float = 0.5, tie_margin: float = 0.0) -> Array:
    z = beta * x.gap
    tie = math.expm1(2 * theta) / ((1 + np.exp(theta + z)) * (1 + np.exp(theta - z)))
    return np.where(np.abs(x.margins) <= tie_margin, -np.log(tie), nls(z - theta))


def ld_dpo(x: Facts, beta: float = 0.1, alpha: float = 0.5) -> Array:
    starts = np.cumsum(x.lengths) - x.lengths
    ratios = x.tokens - x.ref_tokens

    def damped(sequence: int, shared: int) -> float:
        mine = ratios[starts[sequence] :][: x.lengths[sequence]]
        return mine[:shared].sum() + alpha * mine[shared:].sum()

    shortest = np.minimum(x.lengths[x.chosen], x.lengths[x.rejected])
    won, lost = (
        np.array([damped(s, k) for s, k in zip(side, shortest, strict=True)])
        for side in (x.chosen, x.rejected)
    )
    return nls(beta * (won - lost))


def wpo(x: Facts, beta: float = 0.01, clamp: bool = True) -> Array:
    w = np.exp(x.total(x.sg.tokens - x.sg.collisions) / x.n)
    product = w[x.chosen] * w[x.rejected]
    return (np.minimum(product, 1) if clamp else product) * nls(beta * x.gap)


def tdpo(x: Facts, beta: float = 0.1, alpha: float = 0.5, stop_gradient: bool = True) -> Array:
    k_l, k_w = x.total(x.kl)[x.rejected], x.total((x.sg if stop_gradient else x).kl)[x.chosen]
    return nls(beta * (x.gap - alpha * (k_l - k_w)))


def anchored_dpo(
    x: Facts, beta: float = 0.1, anchor: str = "hinge", alpha: float = 1.0, tau: float = 1.0
) -> Array:
    ref = x.total(x.ref_tokens)
    up, down = -(x.l_w + ref[x.chosen]), x.l_l + ref[x.rejected]
    hinges = np.maximum(0, tau - x.l_w) + np.maximum(0, x.l_l + tau)
    anchors = {"linear": up + down, "lse": np.log(np.exp(up) + np.exp(down)), "hinge": hinges}
    return nls(beta * x.gap) + alpha * anchors[anchor]


def nca_pair(x: Facts, beta: float = 0.01) -> Array:
    return nls(beta * x.a) + 0.5 * nls(-beta * x.a) + 0.5 * nls(-beta * x.b)


def bco_pair(x: Facts, beta: float = 0.01, delta: float = 0.0) -> Array:
    return nls(beta * x.a - delta) + nls(-(beta * x.b - delta))


def apo_zero(x: Facts, beta: float = 0.1) -> Array:
    return 1 - sigmoid(beta * x.a) + sigmoid(beta * x.b)


def apo_down(x: Facts, beta: float = 0.1) -> Array:
    return sigmoid(beta * x.a) + 1 - sigmoid(beta * x.gap)


def exo_pair(x: Facts, beta: float = 0.1, eps: float = 1e-3) -> Array:
    q = sigmoid(beta * x.gap)
    return q * np.log(q / (1 - eps)) + (1 - q) * np.log((1 - q) / eps)


def discopop(x: Facts, beta: float = 0.05, tau: float = 0.05) -> Array:
    z = beta * x.gap
    m = sigmoid(z / tau)
    return (1 - m) * nls(z) + m * np.exp(-z)


def f_dpo(x: Facts, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float = 0.5) -> Array:
    g: Callable[[Array], Array] = {
        "reverse_kl": lambda u: u,
        "forward_kl": lambda u: -np.exp(-u),
        "js": lambda u: -nls(u),
        "alpha": lambda u: np.exp((alpha - 1) * u) / (alpha - 1),
    }[divergence]
    return nls(beta * (g(x.a) - g(x.b)))


def simpo(x: Facts, beta: float = 2.0, gamma: float = 1.0) -> Array:
    return nls(beta * (x.u_w - x.u_l) - gamma)


def alphapo(x: Facts, beta: float = 2.5, gamma: float = 0.25, alpha: float = 0.25) -> Array:
    reward = [(1 - np.exp(u) ** -alpha) / alpha for u in (x.u_w, x.u_l)]
    return nls(beta * (reward[0] - reward[1]) - gamma)


def orpo(x: Facts, lam: float = 0.1) -> Array:
    p_w, p_l = np.exp(x.u_w), np.exp(x.u_l)
    return -x.u_w + lam * nls(np.log(p_w / (1 - p_w)) - np.log(p_l / (1 - p_l)))


def cpo(x: Facts, beta: float = 0.1, alpha: float = 1.0, average: bool = True) -> Array:
    return nls(beta * (x.l_w - x.l_l)) + alpha * chosen_nll(x, average)


def cpo_simpo(
    x: Facts, beta: float = 2.0, gamma: float = 1.0, alpha: float = 1.0, average: bool = True
) -> Array:
    return simpo(x, beta, gamma) + alpha * chosen_nll(x, average)


def slic_hf(x: Facts, delta: float = 1.0, lam: float = 0.1) -> Array:
    return np.maximum(0, delta - x.l_w + x.l_l) - lam * x.l_w


def bradley_terry(x: Facts, margin: bool = False, center_rewards_coefficient: float = 0.0) -> Array:
    h = x.margins if margin else 0.0
    return nls(x.l_w - x.l_l - h) + center_rewards_coefficient * (x.l_w + x.l_l) ** 2


def kto(x: Facts, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Array:
    z0 = max(0.0, float(x.sg.ratio[x.labels == 0].mean()))
    good, bad = 1 - sigmoid(beta * (x.ratio - z0)), 1 - sigmoid(beta * (z0 - x.ratio))
    return np.select([x.labels > 0, x.labels < 0], [desirable_weight * good, undesirable_weight * bad], 0.0)


def apo_zero_unpaired(
    x: Facts, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Array:
    good, bad = 1 - sigmoid(beta * x.ratio), sigmoid(beta * x.ratio)
    return np.select([x.labels > 0, x.labels < 0], [desirable_weight * good, undesirable_weight * bad], 0.0)


def nll(x: Facts) -> Array:
    return -x.tokens


def f_alpha(x: Facts, alpha: float = 1.0) -> Array:
    return (1 - np.exp(x.tokens) ** alpha) / alpha


def thresholded_nll(x: Facts, threshold: float = 0.2, keep: str = "above", loss: str = "log") -> Array:
    p = np.exp(x.sg.tokens)
    kept = p >= threshold if keep == "above" else p <= threshold
    return np.where(kept, -x.tokens if loss == "log" else 1 - np.exp(x.tokens), 0.0)


def dft(x: Facts) -> Array:
    return -np.exp(x.sg.tokens) * x.tokens
