"""Calibration against closed forms, on margins that are right by construction; and its report."""

from __future__ import annotations

import math

import numpy as np
import pytest

from madpo.trainer.reports.calibration import best_scale, calibration
from madpo.trainer.reports.calibration_report import write_calibration_report

PAIRS = 200_000


def bradley_terry(scale: float = 1.0, pairs: int = PAIRS, seed: int = 0) -> np.ndarray:
    """Margins whose labels are drawn from them, each pair's sign being its label; then multiplied."""
    random = np.random.default_rng(seed)
    truth = random.normal(0, 2, pairs)
    wins = random.random(pairs) < 1 / (1 + np.exp(-truth))
    return scale * np.where(wins, truth, -truth)


def entropy(margins: np.ndarray) -> float:
    """The mean entropy of labels with P = sigmoid(margin), nats: what the log loss is on average."""
    p = 1 / (1 + np.exp(-np.abs(margins)))
    return float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean())


def test_margins_that_are_right_have_no_error_but_chance():
    margins = bradley_terry()
    found = calibration(margins)
    assert abs(found.log_loss - entropy(margins)) < 4 * found.log_loss_standard_error
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    assert abs(found.accuracy - confidence.mean()) < 4 * found.accuracy_standard_error
    assert found.calibration_error < 3 * found.calibration_error_by_chance < 0.01
    assert found.best_scale == pytest.approx(1, abs=0.02)
    assert sum(one.pairs for one in found.bins) == found.pairs == PAIRS
    assert all(abs(one.predicted - one.observed) < 5 * one.standard_error for one in found.bins)


def test_the_error_by_chance_is_what_right_margins_show_on_average():
    found = [calibration(bradley_terry(pairs=500, seed=seed)) for seed in range(200)]
    shown = np.mean([one.calibration_error for one in found])
    expected = np.mean([one.calibration_error_by_chance for one in found])
    assert shown == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_a_wrong_scale_is_found_and_taking_it_mends_the_error(scale):
    margins = bradley_terry(scale)
    found = calibration(margins)
    assert found.best_scale == pytest.approx(1 / scale, rel=0.02)
    assert found.calibration_error > 10 * found.calibration_error_by_chance
    mended = calibration(margins * found.best_scale)
    assert mended.calibration_error < 3 * mended.calibration_error_by_chance
    assert mended.log_loss < found.log_loss


def test_by_hand():
    found = calibration(np.array([2.0, -1.0, 0.0]), bins=1)
    p = [1 / (1 + math.exp(-x)) for x in (2, 1, 0)]
    assert found.accuracy == pytest.approx((1 + 0 + 0.5) / 3)
    assert found.log_loss == pytest.approx(
        (math.log1p(math.exp(-2)) + math.log1p(math.exp(1)) + math.log(2)) / 3
    )
    (one,) = found.bins
    assert (one.pairs, one.predicted, one.observed) == (3, pytest.approx(sum(p) / 3), pytest.approx(0.5))
    assert found.calibration_error == pytest.approx(sum(p) / 3 - 0.5)


def test_margins_without_a_best_scale():
    assert best_scale(np.array([1.0, 2.0])) is None  # never wrong: larger is better
    assert best_scale(np.array([-1.0, 0.5])) == 0.0  # worse than chance
    assert calibration(np.array([1e4, -1e4])).log_loss == pytest.approx(5e3)  # nothing overflows


def test_the_report_stands_alone_and_holds_the_numbers(tmp_path):
    views = {
        "train, cross-fitted": bradley_terry(pairs=900),
        "train, seen in training": bradley_terry(3, 900) + 1,
    }
    path = write_calibration_report(views, tmp_path / "rm" / "annotated" / "report.html")
    page = path.read_text()
    assert page.count("<svg") == 2 and "<title>Margins of rm</title>" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    for name, margins in views.items():
        found = calibration(margins)
        assert name in page and f"{found.accuracy:.3f} ± " in page and f"{found.best_scale:.3f}" in page
    tau = np.quantile(np.abs(views["train, cross-fitted"]), 0.8)
    assert f"τ = {tau:.3g}, quantile:0.8 of train, cross-fitted" in page
