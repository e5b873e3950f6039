"""Completions of several models side by side: numbers do not show how a model writes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from madpo.trainer.formats.text_groups import Text as PromptOrCompletion

LONGEST = 240
"""Characters of a completion that are shown."""


def print_samples(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of `side_by_side` in the width of the terminal, or 120 columns into a file."""
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(side_by_side(rows))


def side_by_side(rows: Sequence[Mapping[str, Any]], count: int = 4) -> Table:
    """A table of the first `count` prompts and the first completion of each model, with its score.

    `rows` are those of `generated/<split>.jsonl`.
    """
    models = list(dict.fromkeys(rows[0]["models"]))
    columns = [Column(header=Text(name), overflow="fold") for name in ("prompt", *models)]
    table = Table(*columns, pad_edge=False, show_lines=True)
    for row in rows[:count]:
        first = [row["models"].index(model) for model in models]
        table.add_row(Text(_shown(row["prompt"])), *(Text(_with_score(row, index)) for index in first))
    return table


def _with_score(row: Mapping[str, Any], index: int) -> str:
    score = row["scores"][index] if "scores" in row else None
    return _shown(row["completions"][index]) + ("" if score is None else f"  [{score:.2f}]")


def _shown(text: PromptOrCompletion) -> str:
    """A text, or the last message of a conversation, on one line and cut at `LONGEST`."""
    words = " ".join((text if isinstance(text, str) else str(text[-1]["content"])).split())
    return words if len(words) <= LONGEST else words[:LONGEST] + "..."
