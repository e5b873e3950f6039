"""Second opinions, as in second_opinions.py, on losses of the whole step: what they remember comes along."""

from __future__ import annotations

import math

import numpy as np
from facts import Array, Facts, nls, sigmoid

Kept = tuple[Array, dict[str, list[float]]]


def draws(count: int, seed: tuple[int, int]) -> Array:
    """Uniform numbers of a step: 53 bits of Philox words under the key (seed, step), whose counter begins
    where its highest word is 1."""
    words = np.random.Philox(key=np.array(seed, np.uint64), counter=1 << 192).random_raw(count)
    return np.array([((int(word) >> 11) + 0.5) / 2**53 for word in words])


def moving(x: Facts, values: Array, momentum: float) -> tuple[float, float]:
    """Mean and unbiased deviation, moved towards those of the step."""
    mean, std = x.memory.get("moments", [0.0, 0.0])
    return (
        momentum * mean + (1 - momentum) * values.mean(),
        momentum * std + (1 - momentum) * math.sqrt(values.var() * len(values) / (len(values) - 1)),
    )


def beta_dpo(
    x: Facts,
    beta: float = 0.1,
    alpha: float = 0.6,
    drop: float = 0.2,
    momentum: float = 0.9,
    min_beta: float = 1e-3,
) -> Kept:
    gaps = x.sg.gap
    mean, std = moving(x, gaps, momentum)
    # The first arrivals of clocks whose rates are the weights are a draw without replacement.
    arrivals = -np.log(draws(len(gaps), x.seed)) / np.exp(-0.5 * ((gaps - mean) / std) ** 2)
    kept = arrivals <= np.sort(arrivals)[int(len(gaps) * (1 - drop)) - 1]
    of_step = max(beta * (1 + alpha * (gaps[kept].mean() - mean)), min_beta)
    return np.where(kept, nls(of_step * x.gap), 0.0), {"moments": [mean, std]}


def alpha_dpo(
    x: Facts, beta: float = 2.5, gamma: float = 1.5, alpha: float = 0.2, momentum: float = 0.9
) -> Kept:
    gaps = x.sg.a / x.n_w - x.sg.b / x.n_l
    mean, std = moving(x, gaps, momentum)
    z = beta * (x.u_w - x.u_l - alpha * (gaps - mean) / std) - gamma
    return nls(z), {"moments": [mean, std]}


def amapo(x: Facts, beta: float = 2.0) -> Array:
    gaps = x.sg.u_w - x.sg.u_l
    mean, std = gaps.mean(), gaps.std(ddof=1)
    margin = np.where(gaps < mean, beta * np.exp((mean - gaps) / std * mean), 0.0)
    return nls(beta * (x.u_w - x.u_l) - margin)


def gamma_po(x: Facts, beta: float = 2.5, gamma: float = 1.0, tau: float = 10.0, base: str = "simpo") -> Kept:
    z, of_step = (beta * (y.u_w - y.u_l if base == "simpo" else y.gap) for y in (x, x.sg))
    queue = np.array(x.memory.get("gaps", []))
    drawn = np.argsort(draws(len(queue), x.seed))[: max(256 - len(z), 0)]
    gaps = np.concatenate((of_step, queue[drawn]))
    p = np.full(len(gaps), 1 / len(gaps))
    for _ in range(19):
        slope = gamma * sigmoid(gamma * len(gaps) * p - gaps) + tau * (1 + np.log(len(gaps) * p))
        p = p * np.exp(-min(0.5 / tau, 1) * slope)
        p /= p.sum()
    margin = gamma * len(gaps) * p[: len(z)]
    memory = {"gaps": [*queue.tolist(), *of_step.tolist()][-2048:]}
    return nls(z - (margin if base == "simpo" else margin - gamma)), memory


def dr_dpo(x: Facts, beta: float = 0.1, beta_prime: float = 1.0) -> Array:
    mean = np.mean(sigmoid(beta * x.gap) ** (1 / beta_prime))
    return np.full(len(x.gap), -beta_prime * np.log(mean))


def aot(x: Facts, beta: float = 0.01, label_smoothing: float = 0.0) -> Array:
    ref = x.total(x.ref_tokens)
    z = beta * (np.sort(x.l_w - x.l_l) - np.sort(ref[x.chosen] - ref[x.rejected]))
    return (1 - label_smoothing) * nls(z) + label_smoothing * nls(-z)


def aot_unpaired(x: Facts, beta: float = 0.01, label_smoothing: float = 0.0) -> Array:
    z = beta * (np.sort(x.a) - np.sort(x.b))
    return (1 - label_smoothing) * nls(z) + label_smoothing * nls(-z)
