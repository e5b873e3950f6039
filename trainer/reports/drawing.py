"""Drawings as SVG inside a page: matplotlib draws, the page's style sheet gives the colours.

matplotlib is given the colours of a light page. In the SVG each is replaced by the style sheet's variable for
it, so that the drawing turns dark with the page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from madpo.trainer.reports.page import PALETTE, Colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIABLES = {
    **{light: f"--c{number}" for number, (light, _) in enumerate(PALETTE)},
    "#1f2430": "--ink",
    "#5b6372": "--soft",
    "#c3c8d0": "--grid",
    "#ffffff": "--paper",
}
INK, SOFT, GRID, PAPER = (colour for colour in VARIABLES if colour not in dict(PALETTE))
MOST_POINTS = 500
"""Points of a curve that answer to the pointer; of a longer curve every k-th."""


def colour(number: Colour) -> str:
    """A colour as matplotlib takes it. Numbers above the palette's begin again."""
    if isinstance(number, int):
        return PALETTE[number % len(PALETTE)][0]
    return INK if number == "ink" else SOFT


@dataclass
class Drawing:
    """Axes to draw on; the SVG and the values under the pointer are there after `draw` has ended."""

    axes: Axes
    x_name: str  # what the pointer calls the horizontal axis
    svg: Markup = field(default_factory=Markup)
    values: dict[str, Any] = field(default_factory=dict)
    _series: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, label: str, number: Colour, x: Sequence[float], y: Sequence[float]) -> None:
        """Let the pointer show these values."""
        stride = -(-len(x) // MOST_POINTS) or 1
        points = [
            [float(f"{a:.6g}"), float(f"{b:.4g}")]
            for a, b in zip(x[::stride], y[::stride], strict=True)
            if np.isfinite(b)
        ]
        if points:
            variable = f"--c{number % len(PALETTE)}" if isinstance(number, int) else f"--{number}"
            self._series.append({"label": label, "colour": variable, "points": points})

    def finish(self, svg: str, width: float, height: float) -> None:
        """Take the finished SVG, whose size is given in points, and say where its axes are."""
        self.svg = Markup(svg)
        box, (low, high) = self.axes.get_position(), self.axes.get_xlim()
        self.values = {
            "left": round(box.x0 * width, 2),
            "right": round(box.x1 * width, 2),
            "top": round((1 - box.y1) * height, 2),
            "bottom": round((1 - box.y0) * height, 2),
            "low": low,
            "high": high,
            "name": self.x_name,
            "series": self._series,
        }


@contextmanager
def draw(title: str, x_name: str = "step") -> Iterator[Drawing]:
    """Context manager: a drawing to be filled.

    Text stays text, in the page's font; ids are unique to the title.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": title, "svg.fonttype": "none", "font.size": 9}
    width, height = 5.4, 2.6
    with matplotlib.rc_context(style), StringIO() as file:
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot(xmargin=0.02)
        axes.tick_params(color=GRID, labelcolor=SOFT)
        axes.grid(color=GRID, alpha=0.4)
        axes.spines[:].set_color(GRID)
        axes.spines[["top", "right"]].set_visible(False)
        drawing = Drawing(axes, x_name)
        yield drawing
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
        svg = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*</metadata>", "", file.getvalue())
        svg = re.sub(r'<g id="[^"]*"', "<g", svg)
        svg = re.sub("|".join(VARIABLES), lambda match: f"var({VARIABLES[match[0]]})", svg)
        drawing.finish(svg, 72 * width, 72 * height)


def running_mean(
    values: np.ndarray,  # (N,)
    window: int,
) -> np.ndarray:
    """(N,) the mean of the finite values within half a window, at the ends of as many as there are."""
    finite = np.isfinite(values)
    kernel = np.ones(window)
    counts = np.convolve(finite, kernel, "same")
    sums = np.convolve(np.where(finite, values, 0.0), kernel, "same")
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def limits(
    values: Sequence[float],
    shown: Sequence[float],
    least_span: float,
) -> tuple[float, float] | None:
    """Limits of an axis that hold all values and those that are always shown, and span at least so much.

    So noise is not magnified to the height of the chart. None without a finite value.
    """
    finite = [value for value in (*values, *shown) if np.isfinite(value)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    missing = max(least_span - (high - low), 0.0)
    pad = 0.04 * (high - low + missing)
    return low - missing / 2 - pad, high + missing / 2 + pad
