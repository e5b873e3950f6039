"""Reports of what was read, cut and dropped, for `data_report.json`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from madpo.trainer.data.dataset import column_of, flat_column

LISTS = {"chat_template": "notes", "unused_columns": "unused", "foreign_turn_marks": "foreign_marks"}
"""Key of the report -> the column of the table whose texts it counts."""


def report_of(
    name: str,
    table: datasets.Dataset,
    taken: np.ndarray,  # (G,) rows of the table that become groups
) -> dict[str, Any]:
    """What was read and dropped, over all rows of the table; and what is trained on, over those taken."""
    problems = table.data.column("problem")
    reasons = pc.call_function("if_else", [table.data.column("unreadable"), "unreadable", problems])
    dropped = {reason: number for reason, number in _counted(reasons).items() if reason}
    margins = flat_column(table.select(taken), "margins")
    margins = margins[~np.isnan(margins)]
    report: dict[str, Any] = {
        "source": name,
        "rows": len(table),
        "groups": len(taken),
        "dropped": dropped,
        "tokens": int(column_of(table, "num_tokens")[taken].sum()),
        "truncated_completions": int(column_of(table, "truncated")[taken].sum()),
        "groups_with_moved_boundary": int((column_of(table, "boundary_cut")[taken] > 0).sum()),
        "comparisons_of_equal_tokens": int(column_of(table, "equal")[taken].sum()),
        "rows_that_spell_special_tokens": int(column_of(table, "spells_special").sum()),
        "texts_that_spell_special_tokens": int(column_of(table, "spelled_in_text").sum()),
        "unscored_completion_tokens": int(
            (column_of(table, "num_completion_tokens") - column_of(table, "num_scored_tokens"))[taken].sum()
        ),
    }
    for key, column in LISTS.items():
        if counts := _counted(pc.call_function("list_flatten", [table.data.column(column).take(taken)])):
            report[key] = counts
    if len(margins):
        report |= {
            "margins": len(margins),
            "margin_min": float(margins.min()),
            "margin_max": float(margins.max()),
            "margin_mean": float(margins.mean()),
        }
    return report


def _counted(column: Any) -> dict[str, int]:
    """Text -> how often it stands in a column, in alphabetical order."""
    values, counts = pc.call_function("value_counts", [column]).flatten()
    return dict(sorted(zip(values.to_pylist(), counts.to_pylist(), strict=True)))


def total_report(name: str, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several parts together."""
    counts = [key for key, value in reports[0].items() if isinstance(value, int) and key != "margins"]
    reasons = sorted({reason for report in reports for reason in report["dropped"]})
    total: dict[str, Any] = {"source": name, **{key: sum(x[key] for x in reports) for key in counts}}
    total["dropped"] = {reason: sum(x["dropped"].get(reason, 0) for x in reports) for reason in reasons}
    for key in LISTS:
        counted = Counter[str]()
        for report in reports:
            counted.update(report.get(key, {}))
        if counted:
            total[key] = dict(sorted(counted.items()))
    with_margins = [report for report in reports if "margins" in report]
    if with_margins:
        number = sum(x["margins"] for x in with_margins)
        total |= {
            "margins": number,
            "margin_min": min(x["margin_min"] for x in with_margins),
            "margin_max": max(x["margin_max"] for x in with_margins),
            "margin_mean": sum(x["margin_mean"] * x["margins"] for x in with_margins) / number,
        }
    return total


RENDERED = 0.5
"""The share of examples with marks of turns in plain text, above which a template has been rendered."""


def on_marks_in_text(report: dict[str, Any]) -> list[str]:
    """What is to be said of special tokens, and of marks of turns, that plain text spells out."""
    lines = []
    number, rows = report["texts_that_spell_special_tokens"], report["rows"]
    if number > RENDERED * rows:
        lines.append(
            f"{number} of {rows} examples are text in which a chat template was rendered before: special "
            "tokens that it spells out are letters here; data.text_holds_special_tokens=true takes them as "
            "tokens"
        )
    elif number:
        lines.append(f"{number} examples spell out special tokens in plain text, where they are letters")
    mark, number = max(report.get("foreign_turn_marks", {}).items(), key=lambda x: x[1], default=("", 0))
    if number > RENDERED * rows:
        lines.append(
            f"{number} of {rows} examples are text with {mark}, as another model's chat template writes it: "
            "no token of this tokenizer, so it is letters; render the data with the right template"
        )
    return lines


def reasons_in(report: dict[str, Any]) -> str:
    """Why rows were dropped, and how many for each reason, for a message."""
    return "; ".join(f"{count}: {reason}" for reason, count in report["dropped"].items())
