"""`annotated/report.html`: the calibration of reward margins, and the weights that MADPO would give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from madpo.trainer.objectives.madpo import MADPOParams
from madpo.trainer.reports.calibration import Calibration, calibration
from madpo.trainer.reports.html import COLOURS, CSS, GREY, PALE, key, require_matplotlib, svg, table

C_MAX, PAPERS_TAU, QUANTILE = 4.0, 7.0, 0.8


@dataclass(frozen=True)
class View:
    """A set of margins, as one colour in the report."""

    name: str
    colour: str
    margins: np.ndarray  # (N,)
    calibration: Calibration


@dataclass(frozen=True)
class Weight:
    """MADPO's weight as a function of the margin, at one threshold."""

    name: str
    mark: str  # style of its curve, solid or dashed
    tau: float

    def __call__(self, margins: np.ndarray) -> np.ndarray:
        weight = MADPOParams(c_max=C_MAX, tau=self.tau).weight
        return weight(torch.from_numpy(np.asarray(margins, np.float64))).numpy()


def write_calibration_report(
    margins: Mapping[str, np.ndarray],  # name -> (N,)
    output: Path,
) -> Path:
    """Write the report, with all sets of margins on the same charts, and return its path.

    The quantile for MADPO's tau is taken of the first set. Raises UserError if matplotlib is missing.
    """
    require_matplotlib()
    pairs = zip(margins.items(), cycle(COLOURS), strict=False)
    views = [View(name, colour, values, calibration(values)) for (name, values), colour in pairs]
    quantile = float(np.quantile(np.abs(views[0].margins), QUANTILE))
    weights = [
        Weight(f"τ = {PAPERS_TAU:g}, the paper's", "dashed", PAPERS_TAU),
        Weight(f"τ = {quantile:.3g}, quantile:{QUANTILE:g} of {views[0].name}", "solid", quantile),
    ]
    legend = "".join(key("dot", view.colour, view.name) for view in views)
    bars = "".join(key("solid", view.colour, view.name) for view in views)
    curves = "".join(key(weight.mark, "#1f2430", f"weight at {weight.name}") for weight in weights)
    page = PAGE.format(
        title=escape(output.resolve().parent.parent.name),
        css=CSS,
        numbers=_numbers(views),
        reliability=_figure("Reliability", RELIABILITY, legend, _reliability(views)),
        histogram=_figure("Margins and weights", HISTOGRAM, bars + curves, _histogram(views, weights)),
        weights=_weights(views, weights),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output


def _numbers(views: Sequence[View]) -> str:
    all_of = [view.calibration for view in views]
    rows = [["pairs", *(f"{x.pairs:,}" for x in all_of)]]
    rows.append(["accuracy", *(f"{x.accuracy:.3f} ± {x.accuracy_standard_error:.3f}" for x in all_of)])
    rows.append(["log loss, nats", *(f"{x.log_loss:.4f} ± {x.log_loss_standard_error:.4f}" for x in all_of)])
    rows.append(["calibration error", *(f"{x.calibration_error:.4f}" for x in all_of)])
    rows.append(["calibration error by chance", *(f"{x.calibration_error_by_chance:.4f}" for x in all_of)])
    scales = ["above 100" if x.best_scale is None else f"{x.best_scale:.3f}" for x in all_of]
    rows.append(["best scale of the margins", *scales])
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        values = [f"{np.quantile(view.margins, quantile):.3f}" for view in views]
        rows.append([f"margin, {quantile:.0%} quantile", *values])
    return table(["", *(key("solid", view.colour, view.name) for view in views)], rows)


def _weights(views: Sequence[View], weights: Sequence[Weight]) -> str:
    rows = []
    for weight in weights:
        for view in views:
            values, large = weight(view.margins), np.abs(view.margins) > weight.tau
            shares = [float((values > 1).mean()), float((values < 1).mean()), float(large.mean())]
            numbers = [f"{share:.1%}" for share in shares]
            numbers += [f"{x:.3f}" for x in (values.mean(), values.min(), values.max())]
            name = escape(weight.name) if view is views[0] else ""
            rows.append([name, key("solid", view.colour, view.name), *numbers])
    head = ["", "", "weight above 1", "below 1", "|margin| above τ", "mean", "least", "largest"]
    return table(head, rows)


def _figure(title: str, note: str, legend: str, drawing: str) -> str:
    return f"<figure><h3>{title}</h3><p>{note}</p><p>{legend}</p>{drawing}</figure>\n"


def _reliability(views: Sequence[View]) -> str:
    with svg("reliability") as (axes, drawing):
        low = min(0.45, *(one.observed for view in views for one in view.calibration.bins)) - 0.02
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linewidth=0.7, linestyle=(0, (2, 2)))
        for view in views:
            predicted, observed, errors = (
                [getattr(one, name) for one in view.calibration.bins]
                for name in ("predicted", "observed", "standard_error")
            )
            axes.errorbar(predicted, observed, errors, color=view.colour, linewidth=1.1, capsize=0)
            axes.plot(predicted, observed, "o", color=view.colour, markeredgecolor="white", markersize=6)
        axes.set(xlim=(0.49, 1.01), ylim=(low, 1.02))
        axes.set_xlabel("predicted, sigmoid |margin|", color=GREY)
        axes.set_ylabel("observed", color=GREY)
    return drawing.getvalue()


def _histogram(views: Sequence[View], weights: Sequence[Weight]) -> str:
    every = np.concatenate([view.margins for view in views])
    low, high = (float(np.quantile(every, q)) for q in (0.002, 0.998))
    edges = np.linspace(min(low, -1.0), max(high, 1.0), 61)
    with svg("margins") as (axes, drawing):
        for view in views:
            inside = np.clip(view.margins, edges[0], edges[-1])
            share = np.histogram(inside, edges)[0] / len(inside)
            axes.stairs(share, edges, color=view.colour, fill=True, alpha=0.16)
            axes.stairs(share, edges, color=view.colour, linewidth=1.1)
        axes.set_xlabel("margin, chosen minus rejected", color=GREY)
        axes.set_ylabel("share of pairs", color=GREY)
        right = axes.twinx()
        margins = np.linspace(edges[0], edges[-1], 600)
        for weight in weights:
            style = (0, (3, 1.5)) if weight.mark == "dashed" else "-"
            right.plot(margins, weight(margins), color="#1f2430", linewidth=1.1, linestyle=style)
        right.axhline(1, color=GREY, linewidth=0.7, linestyle=(0, (2, 2)))
        right.set(ylim=(0, 2), yticks=(0, 0.5, 1, 1.5, 2))
        right.set_ylabel("weight", color=GREY)
        right.tick_params(color=PALE, labelcolor=GREY)
        right.spines[:].set_visible(False)
    return drawing.getvalue()


RELIABILITY = (
    "how often the preferred completion is the chosen one, in ten bins of equally many pairs; bars: one "
    "standard error if margins are calibrated; below the diagonal: margins are too large"
)
HISTOGRAM = (
    f"share of pairs (left axis; the outermost bars hold all beyond), and MADPO's weight at c_max = "
    f"{C_MAX:g} (right axis; 1 is DPO)"
)

PAGE = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Margins of {title}</title><style>{css}</style>
<p>Margins of a reward model, P(chosen is better) = sigmoid(margin)</p><h1>{title}</h1>{numbers}
<div class="grid">{reliability}{histogram}</div>
<h2>Weights that MADPO would give</h2>{weights}
<p style="margin-top:1rem">Times the best scale, the margins predict the labels best. Below 1 the margins are
too large; set <code>objective.margin_scale</code> to it. A calibration error close to the one by chance means
that no error is visible.</p></html>
"""
