"""`annotated/report.html`: the calibration of reward margins, and the weights that MADPO would give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from madpo.trainer.counted import counted
from madpo.trainer.objectives.madpo import MADPOParams
from madpo.trainer.reports.calibration import Calibration, calibration
from madpo.trainer.reports.drawing import GRID, INK, PAPER, SOFT, colour, draw
from madpo.trainer.reports.page import Cell, Figure, Key, Table, render

C_MAX, PAPERS_TAU, QUANTILE = 4.0, 7.0, 0.8


@dataclass(frozen=True)
class View:
    """A set of margins, as one colour in the report."""

    name: str
    number: int  # gives its colour
    margins: np.ndarray  # (N,)
    calibration: Calibration

    @property
    def key(self) -> Key:
        return Key("solid", self.number, self.name)


@dataclass(frozen=True)
class Weight:
    """MADPO's weight as a function of the margin, at one threshold."""

    name: str
    mark: Literal["solid", "dashed"]
    tau: float

    def __call__(self, margins: np.ndarray) -> np.ndarray:
        weight = MADPOParams(c_max=C_MAX, tau=self.tau).weight
        return weight(torch.from_numpy(np.asarray(margins, np.float64))).numpy()


def write_calibration_report(
    margins: Mapping[str, np.ndarray],  # name -> (N,)
    output: Path,
) -> Path:
    """Write the report, with all sets of margins on the same charts, and return its path.

    The quantile for MADPO's tau is taken of the first set.
    """
    views = [
        View(name, number, values, calibration(values))
        for number, (name, values) in enumerate(margins.items())
    ]
    quantile = float(np.quantile(np.abs(views[0].margins), QUANTILE))
    weights = [
        Weight(f"τ = {PAPERS_TAU:g}, the paper's", "dashed", PAPERS_TAU),
        Weight(f"τ = {quantile:.3g}, quantile:{QUANTILE:g} of {views[0].name}", "solid", quantile),
    ]
    return render(
        "calibration_report.html.jinja",
        output,
        title=output.resolve().parent.parent.name,
        happened=[(view.name, _verdict(view)) for view in views],
        numbers=_numbers(views),
        figures=[_reliability(views), _histogram(views, weights)],
        weights=_weights(views, weights),
    )


def _verdict(view: View) -> str:
    """One sentence on a set of margins."""
    found = view.calibration
    scale = "above 100" if found.best_scale is None else f"{found.best_scale:.2f}"
    accuracy = f"{found.accuracy:.1%} ± {100 * found.accuracy_standard_error:.1f}"
    pairs = counted(found.pairs, "pair")
    return f"chosen above rejected in {accuracy} of {pairs}, best scale of the margins {scale}."


def _numbers(views: Sequence[View]) -> Table:
    all_of = [view.calibration for view in views]
    rows: list[list[Cell]] = [["pairs", *(f"{x.pairs:,}" for x in all_of)]]
    rows.append(["accuracy", *(f"{x.accuracy:.3f} ± {x.accuracy_standard_error:.3f}" for x in all_of)])
    rows.append(["log loss, nats", *(f"{x.log_loss:.4f} ± {x.log_loss_standard_error:.4f}" for x in all_of)])
    rows.append(["calibration error", *(f"{x.calibration_error:.4f}" for x in all_of)])
    rows.append(["calibration error by chance", *(f"{x.calibration_error_by_chance:.4f}" for x in all_of)])
    scales = ["above 100" if x.best_scale is None else f"{x.best_scale:.3f}" for x in all_of]
    rows.append(["best scale of the margins", *scales])
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        values = [f"{np.quantile(view.margins, quantile):.3f}" for view in views]
        rows.append([f"margin, {quantile:.0%} quantile", *values])
    return Table(["", *(view.key for view in views)], rows)


def _weights(views: Sequence[View], weights: Sequence[Weight]) -> Table:
    rows = list[list[Cell]]()
    for weight in weights:
        for view in views:
            values, large = weight(view.margins), np.abs(view.margins) > weight.tau
            shares = [float((values > 1).mean()), float((values < 1).mean()), float(large.mean())]
            numbers = [f"{share:.1%}" for share in shares]
            numbers += [f"{x:.3f}" for x in (values.mean(), values.min(), values.max())]
            name = weight.name if view is views[0] else ""
            rows.append([name, view.key, *numbers])
    head = ["", "", "weight above 1", "below 1", "|margin| above τ", "mean", "least", "largest"]
    return Table(head, rows)


def _reliability(views: Sequence[View]) -> Figure:
    title = "Reliability"
    with draw(title, "predicted") as drawing:
        axes = drawing.axes
        low = min(0.45, *(one.observed for view in views for one in view.calibration.bins)) - 0.02
        axes.plot([0.5, 1], [0.5, 1], color=SOFT, linewidth=0.7, linestyle=(0, (2, 2)))
        for view in views:
            predicted, observed, errors = (
                [getattr(one, name) for one in view.calibration.bins]
                for name in ("predicted", "observed", "standard_error")
            )
            own = colour(view.number)
            axes.errorbar(predicted, observed, errors, color=own, linewidth=1.1, capsize=0)
            axes.plot(predicted, observed, "o", color=own, markeredgecolor=PAPER, markersize=6, clip_on=False)
            drawing.answer(view.name, view.number, predicted, observed)
        axes.set(xlim=(0.49, 1.01), ylim=(low, 1.02))
        axes.set_xlabel("predicted, sigmoid |margin|", color=SOFT)
        axes.set_ylabel("observed", color=SOFT)
    return Figure(title, RELIABILITY, [_dot(view) for view in views], drawing.svg, drawing.values)


def _dot(view: View) -> Key:
    return Key("dot", view.number, view.name)


def _histogram(views: Sequence[View], weights: Sequence[Weight]) -> Figure:
    title = "Margins and weights"
    every = np.concatenate([view.margins for view in views])
    low, high = (float(np.quantile(every, q)) for q in (0.002, 0.998))
    edges = np.linspace(min(low, -1.0), max(high, 1.0), 61)
    with draw(title, "margin") as drawing:
        axes = drawing.axes
        for view in views:
            inside = np.clip(view.margins, edges[0], edges[-1])
            share = np.histogram(inside, edges)[0] / len(inside)
            axes.stairs(share, edges, color=colour(view.number), fill=True, alpha=0.16)
            axes.stairs(share, edges, color=colour(view.number), linewidth=1.1)
            middles = np.round((edges[:-1] + edges[1:]) / 2, 2)
            drawing.answer(f"{view.name}, share", view.number, middles.tolist(), share.tolist())
        axes.set_xlabel("margin, chosen minus rejected", color=SOFT)
        axes.set_ylabel("share of pairs", color=SOFT)
        right = axes.twinx()
        margins = np.linspace(edges[0], edges[-1], 600).round(2)
        for weight in weights:
            style = (0, (3, 1.5)) if weight.mark == "dashed" else "-"
            values = weight(margins)
            right.plot(margins, values, color=INK, linewidth=1.1, linestyle=style)
            drawing.answer(f"weight, τ = {weight.tau:.3g}", "ink", margins.tolist(), values.tolist())
        right.axhline(1, color=SOFT, linewidth=0.7, linestyle=(0, (2, 2)))
        right.set(ylim=(0, 2), yticks=(0, 0.5, 1, 1.5, 2))
        right.set_ylabel("weight", color=SOFT)
        right.tick_params(color=GRID, labelcolor=SOFT)
        right.spines[:].set_visible(False)
    keys = [*(view.key for view in views), *(Key(x.mark, "ink", f"weight at {x.name}") for x in weights)]
    return Figure(title, HISTOGRAM, keys, drawing.svg, drawing.values)


RELIABILITY = (
    "how often the preferred completion is the chosen one, in ten bins of equally many pairs; bars: one "
    "standard error if margins are calibrated; below the diagonal: margins are too large"
)
HISTOGRAM = (
    f"share of pairs (left axis; the outermost bars hold all beyond), and MADPO's weight at c_max = "
    f"{C_MAX:g} (right axis; 1 is DPO)"
)
