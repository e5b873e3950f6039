"""Drawings: the page's colours, axes that do not magnify noise, running means, values for the pointer."""

from __future__ import annotations

import re

import numpy as np
import pytest

from madpo.trainer.reports.drawing import MOST_POINTS, colour, draw, limits, running_mean


def test_a_drawing_takes_its_colours_from_the_page_and_places_its_values():
    with draw("a") as drawing:
        drawing.axes.plot([0, 10], [1, 2], color=colour(11), marker="o", markeredgecolor=colour("ink"))
        drawing.axes.set_xlim(0, 10)
        drawing.answer("run", 11, [0, 10], [1.0, float("nan")])
    assert "stroke: var(--c1)" in drawing.svg and "var(--ink)" in drawing.svg
    assert not re.search(r"#[0-9a-f]{6}\b", drawing.svg)
    values = drawing.values
    assert values["series"] == [{"label": "run", "colour": "--c1", "points": [[0.0, 1.0]]}]
    assert 0 < values["left"] < values["right"] < 5.4 * 72 and 0 < values["top"] < values["bottom"] < 2.6 * 72
    # Where the SVG draws the curve's ends is where the pointer looks for them.
    ends = re.search(r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [\d.]+ \n" clip-path[^>]*--c1', drawing.svg)
    assert ends is not None
    assert [float(x) for x in ends.groups()] == pytest.approx([values["left"], values["right"]], abs=0.02)


def test_long_curves_answer_with_some_of_their_points():
    with draw("a") as drawing:
        drawing.answer("run", 0, list(range(2001)), [0.5] * 2001)
    points = drawing.values["series"][0]["points"]
    assert len(points) <= MOST_POINTS and points[1] == [5.0, 0.5]


def test_axes_do_not_magnify_noise():
    low, high = limits([1.0004, 1.0014], (1.0, 1.2), 0.0) or (0, 0)
    assert low < 1.0 and high > 1.2 and high - low < 0.25
    low, high = limits([0.5, 0.501], (), 0.05) or (0, 0)
    assert high - low == pytest.approx(0.05 * 1.08) and (low + high) / 2 == pytest.approx(0.5005)
    low, high = limits([1.0, float("inf"), 5.0], (), 0.05) or (0, 0)
    assert low < 1.0 and 5.0 < high < 5.5
    assert limits([float("nan")], (), 1.0) is None


def test_running_means_by_hand():
    values = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    assert running_mean(values, 3).tolist() == [1.5, 3.0, 4.0, 5.0, 4.0]
    assert running_mean(np.arange(5.0), 1).tolist() == [0, 1, 2, 3, 4]
