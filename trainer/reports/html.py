"""The parts of an HTML report: SVG drawings, tables, and one style. None needs the network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from importlib.util import find_spec
from io import StringIO
from typing import TYPE_CHECKING, Any

from madpo.trainer.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, PALE = "#5b6372", "#c3c8d0"
COLOURS = ("#2f6db5", "#d9772b", "#3a9168", "#8a5fb0", "#b8435a", "#6b7280")


def require_matplotlib() -> None:
    """Raise UserError if matplotlib is missing."""
    if find_spec("matplotlib") is None:
        raise UserError("report needs matplotlib: pip install 'madpo[report]'")


@contextmanager
def svg(title: str) -> Iterator[tuple[Axes, StringIO]]:
    """Context manager: axes to draw on, and a buffer that holds the SVG after exit.

    Text stays text, in the page's font; ids are unique to the title.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": title, "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(style), StringIO() as file:
        figure, drawing = Figure(figsize=(5.4, 2.6), layout="constrained"), StringIO()
        axes = figure.add_subplot(xmargin=0.02)
        axes.tick_params(color=PALE, labelcolor=GREY)
        axes.grid(color=PALE, alpha=0.4)
        axes.spines[:].set_color(PALE)
        axes.spines[["top", "right"]].set_visible(False)
        yield axes, drawing
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
        text = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*</metadata>", "", file.getvalue())
        drawing.write(re.sub(r'<g id="[^"]*"', "<g", text))


def key(mark: str, colour: str, label: str) -> str:
    """An entry of a legend: a mark (solid, dashed or dot) and its label."""
    return f'<span><i class="{mark}" style="color:{colour}"></i>{escape(label)}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; the cells are HTML already."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head)] if any(head) else []
    lines += [f"<th>{first}</th>" + "".join(f"<td>{x}</td>" for x in rest) for first, *rest in rows]
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table>\n{body}</table></div>'


def text(value: Any) -> str:
    """A value as HTML: whole numbers in full, others to four digits, nothing for None."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else escape("" if value is None else str(value))


CSS = """
body { margin: 0 auto; max-width: 1100px; padding: 2.5rem 1.25rem 4rem; background: #fff;
  color: #1f2430; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; } h3 { font-size: .95rem; margin: 0; }
p, th { margin: 0; color: #5b6372; } table { border-collapse: collapse; font-size: .87rem; }
.grid { display: grid; gap: 1.25rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem 4rem; margin: 1.25rem 0; }
.side > div { max-width: 100%; } .scroll, pre { overflow-x: auto; }
figure { display: flex; flex-direction: column; margin: 0; padding: .9rem 1rem .5rem;
  border: 1px solid #e3e6ea; border-radius: 8px; font-size: .8rem; }
svg { width: 100%; height: auto; margin-top: auto; } svg text { font-family: inherit !important; }
i { display: inline-block; width: 1.3em; margin: 0 .45em .22em 0; border-top: 2.5px solid; }
i.dashed { border-top-style: dashed; } span { display: inline-block; margin-right: 1.1em; }
i.dot { width: 0; border: .28em solid; border-radius: 50%; margin-bottom: .05em; }
th, td { border-bottom: 1px solid #eceef1; padding: .3rem 1.5rem .3rem 0; white-space: nowrap;
  text-align: right; font-weight: 400; font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; } summary { cursor: pointer; font-weight: 600; }
pre { background: #f5f6f8; border-radius: 6px; padding: .75rem 1rem; margin: .5rem 0 0;
  font: .83rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""
