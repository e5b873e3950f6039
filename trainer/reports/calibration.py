"""The calibration of a reward model's margins, read as P(chosen is better) = sigmoid(margin).

The model prefers one completion of each pair, with confidence sigmoid(|margin|). The confidence is compared
with how often the preferred completion is the chosen one.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs of similar confidence."""

    predicted: float  # mean of sigmoid(|margin|)
    observed: float  # share of pairs whose preferred completion is the chosen one
    pairs: int
    standard_error: float  # of `observed`, if `predicted` were right


@dataclass(frozen=True)
class Calibration:
    pairs: int
    accuracy: float  # share with margin > 0; half for margin 0
    accuracy_standard_error: float
    log_loss: float  # mean of -log sigmoid(margin), nats
    log_loss_standard_error: float
    calibration_error: float  # mean over pairs of |predicted - observed| of their bin
    calibration_error_by_chance: float  # that of perfectly calibrated margins, expected on as many pairs
    best_scale: float | None  # s with the least mean -log sigmoid(s margin); None: above the range searched
    bins: list[Bin]

    def numbers(self) -> dict[str, Any]:
        """All fields, as values for JSON."""
        return asdict(self)


def calibration(
    margins: np.ndarray,  # (N,)
    bins: int = BINS,
) -> Calibration:
    """Compare the margins with the labels, in `bins` bins of equally many pairs.

    Bins have equal counts because most pairs of a good model lie near certainty (Nguyen and O'Connor 2015;
    the calibration error: Naeini et al. 2015). The best scale is that of temperature scaling (Guo et al.
    2017); below 1 the margins are too large.
    """
    assert len(margins)
    margins = np.asarray(margins, np.float64)
    right = np.where(margins == 0, 0.5, margins > 0)
    confidence = _sigmoid(np.abs(margins))
    losses = np.logaddexp(0, -margins)
    order = np.argsort(confidence, kind="stable")
    filled = [_bin(confidence[part], right[part]) for part in np.array_split(order, bins) if len(part)]
    shares = np.array([one.pairs for one in filled]) / len(margins)
    gaps = np.array([abs(one.predicted - one.observed) for one in filled])
    noise = np.array([one.standard_error for one in filled]) * math.sqrt(2 / math.pi)  # E|N(0, 1)|
    return Calibration(
        pairs=len(margins),
        accuracy=float(right.mean()),
        accuracy_standard_error=_standard_error(right),
        log_loss=float(losses.mean()),
        log_loss_standard_error=_standard_error(losses),
        calibration_error=float(shares @ gaps),
        calibration_error_by_chance=float(shares @ noise),
        best_scale=best_scale(margins),
        bins=filled,
    )


def best_scale(
    margins: np.ndarray,  # (N,)
    largest: float = 100.0,
) -> float | None:
    """The s >= 0 with the least mean of -log sigmoid(s margin); None if that is above `largest`.

    Found by bisection of the derivative, which only rises.
    """

    def slope(scale: float) -> float:
        return -float((margins * _sigmoid(-scale * margins)).mean())

    low, high = 0.0, largest
    if slope(low) >= 0:
        return 0.0
    if slope(high) < 0:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


def _bin(confidence: np.ndarray, right: np.ndarray) -> Bin:
    variance = float((confidence * (1 - confidence)).mean())
    return Bin(
        predicted=float(confidence.mean()),
        observed=float(right.mean()),
        pairs=len(right),
        standard_error=math.sqrt(variance / len(right)),
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _standard_error(values: np.ndarray) -> float:
    """The standard error of the mean of the values (N,)."""
    return float(values.std() / math.sqrt(len(values)))
