"""HTML pages from templates, each one file that needs no network; their colours follow the reader's system.

Templates escape what they are given. What is drawn or styled here comes as `Markup`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from madpo.trainer.files import write_named

TEMPLATES = Path(__file__).parent / "templates"
PALETTE = (
    ("#2f6db5", "#6ea8ee"),
    ("#d9772b", "#f09a5b"),
    ("#3a9168", "#63c08f"),
    ("#8a5fb0", "#b592dc"),
    ("#b8435a", "#ea7a8e"),
    ("#0f8b8d", "#4fc3c5"),
    ("#a67c00", "#d9b44a"),
    ("#5a6acf", "#98a4f5"),
    ("#c2549d", "#ea8cc8"),
    ("#7a5c45", "#c3a389"),
)
"""Colours of curves, on a light and on a dark page; the style sheet calls them --c0, --c1, ..."""

Mark = Literal["solid", "dashed", "dashdot", "dotted", "faint", "dot"]

Colour = int | Literal["ink", "soft"]
"""A colour of the palette by its number, or a colour of the text."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend, or a name in a table: a mark and its label."""

    mark: Mark
    colour: Colour
    label: str

    @property
    def variable(self) -> str:
        """The name of its colour in the style sheet."""
        return f"--c{self.colour % len(PALETTE)}" if isinstance(self.colour, int) else f"--{self.colour}"


Cell = str | Key


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row names it."""

    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing with its title, its legend, and the values that the pointer shows."""

    title: str
    note: str
    keys: Sequence[Key]
    drawing: Markup
    values: Mapping[str, Any] = field(default_factory=dict)


def render(template: str, output: Path, **values: Any) -> Path:
    """Write a page, making its folder, and return its path. Raises UserError as `write_named`."""
    page = _environment().get_template(template).render(palette=PALETTE, **values)
    write_named(output, page)
    return output


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))
    return environment


def text(value: Any) -> str:
    """A value as text: whole numbers in full, others to four digits, nothing for None; lists with commas."""
    if isinstance(value, list):
        return ", ".join(map(text, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() or abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else "" if value is None else str(value)


def object_table(title: str, columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """A titled table with a row per name and a column per object; nested objects are flattened."""
    flat = [_flatten(column) for column in columns.values()]
    names: Iterable[str] = dict.fromkeys(name for column in flat for name in column)
    rows = [[name, *(text(column.get(name)) for column in flat)] for name in names]
    return Table(["", *columns] if any(columns) else [], rows, title)


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for inner, value in nested.items():
        name = prefix + inner
        flat |= _flatten(value, f"{name}: ") if isinstance(value, dict) else {name: value}
    return flat
