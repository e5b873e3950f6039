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


SPREADS = {"margins", "weights", "weights_of_0", "rows_without_weight"}
"""Counts that a part may lack, because its rows have no margins or no weights."""


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
    weights = flat_column(table.select(taken), "completion_weights")
    if len(weights):
        without = int((column_of(table, "num_weights")[taken] == 0).sum())
        report |= {
            "weights": len(weights),
            "weights_of_0": int((weights == 0).sum()),
            "rows_without_weight": without,
            **_spread("weight", weights),
        }
    for key, column in LISTS.items():
        if counts := _counted(pc.call_function("list_flatten", [table.data.column(column).take(taken)])):
            report[key] = counts
    if len(margins):
        report |= {"margins": len(margins), **_spread("margin", margins)}
    return report


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Extrema and mean of the values (N,)."""
    return {
        f"{name}_min": float(values.min()),
        f"{name}_max": float(values.max()),
        f"{name}_mean": float(values.mean()),
    }


def _counted(column: Any) -> dict[str, int]:
    """Text -> how often it stands in a column, in alphabetical order."""
    values, counts = pc.call_function("value_counts", [column]).flatten()
    return dict(sorted(zip(values.to_pylist(), counts.to_pylist(), strict=True)))


def total_report(name: str, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several parts together."""
    counts = [key for key, value in reports[0].items() if isinstance(value, int) and key not in SPREADS]
    reasons = sorted({reason for report in reports for reason in report["dropped"]})
    total: dict[str, Any] = {"source": name, **{key: sum(x[key] for x in reports) for key in counts}}
    total["dropped"] = {reason: sum(x["dropped"].get(reason, 0) for x in reports) for reason in reasons}
    for key in LISTS:
        counted = Counter[str]()
        for report in reports:
            counted.update(report.get(key, {}))
        if counted:
            total[key] = dict(sorted(counted.items()))
    return total | _total_spread("margin", reports) | _total_weights(reports)


def _total_weights(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers on weights of all parts together; groups of a part without weights have none."""
    spread = _total_spread("weight", reports)
    if spread:
        spread["weights_of_0"] = sum(x.get("weights_of_0", 0) for x in reports)
        spread["rows_without_weight"] = sum(x.get("rows_without_weight", x["groups"]) for x in reports)
    return spread


def _total_spread(name: str, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Number, extrema and mean of margins or weights over all parts that have any."""
    having = [report for report in reports if f"{name}s" in report]
    if not having:
        return {}
    number = sum(x[f"{name}s"] for x in having)
    return {
        f"{name}s": number,
        f"{name}_min": min(x[f"{name}_min"] for x in having),
        f"{name}_max": max(x[f"{name}_max"] for x in having),
        f"{name}_mean": sum(x[f"{name}_mean"] * x[f"{name}s"] for x in having) / number,
    }


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
