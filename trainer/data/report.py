"""Reports of what was read, cut and dropped, and of what is odd, for `data_report.json` and the console.

A report counts. Its `where` names the examples behind each count by file and row, the first MOST_PLACES.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from madpo.trainer.counted import counted
from madpo.trainer.data.dataset import column_of, flat_column, lists_of
from madpo.trainer.data.repeats import MOST_CLAIMS, NONE, KnownClaims, Repeats, find_repeats

Report = dict[str, Any]
"""What was read, cut and dropped of a split or of one part of it."""

Reports = Callable[[], dict[str, Report]]
"""Gives the reports of a split's parts by name, that of all parts together first. Only who shows them asks: a
report of millions of rows takes long."""

MOST_PLACES = 20
"""The number of examples that are named for each reason."""

FAR = 1000
"""A margin of so many times the median size, taken over margins other than 0, is far from the rest."""

UNREADABLE = "unreadable"
"""The reason for which examples that could not be read are dropped; each of them has its own besides."""

HELD_OUT = "held_out_examples_in_training"

NOT_KEPT = "claims_not_kept"

UNSCORED = "unscored_completion_tokens"

COUNTS = {
    "truncated_completions": "completions cut at max_length",
    "groups_with_moved_boundary": "prompts whose last tokens merge with the completion",
    "comparisons_of_equal_tokens": "pairs left out: both completions are the same tokens",
    "rows_that_spell_special_tokens": "conversations spell out a special token, which becomes that token",
    UNSCORED: "tokens of completions are not trained on (data.train_on, or weight 0)",
    "repeated_examples": "examples repeat an earlier one",
    "contradicting_examples": "examples contradict another: same texts, the opposite preference or label",
    HELD_OUT: "held-out examples, or their texts the other way round, are trained on",
    NOT_KEPT: f"statements are not kept for the comparison with later examples: {MOST_CLAIMS:,} are",
    "examples_of_the_rarer_kind": "examples differ in kind: conversations and plain text are mixed",
    "rows_without_weight": "examples without a weight count with 1",
    "rows_of_weight_0": "examples have weight 0: their losses are 0 in the mean",
    "margins_far_from_the_rest": f"margins are more than {FAR} times as large as the median",
}
"""Counts of a report -> what is printed after the number."""

LISTS = {
    "odd_texts": "odd",
    "chat_template": "notes",
    "unused_columns": "unused",
    "foreign_turn_marks": "foreign_marks",
    "turn_marks_in_messages": "marks_in_messages",
}
"""Key of a report -> the column of the table whose texts it counts."""


class _Found(NamedTuple):
    """What a key of COUNTS stands for in a table."""

    number: int
    rows: np.ndarray  # (n,) of the table
    others: np.ndarray | None = None  # (n,) the row that each of them repeats or contradicts


SPREADS = {"margins", "rows_with_weight", "rows_of_weight_0", "rows_without_weight"}
"""Counts that a part may lack, because its rows have no margins or no weights."""


def report_of(
    name: str,
    table: datasets.Dataset,
    taken: np.ndarray,  # (G,) rows of the table that become groups; a row may become several
    where: Callable[[int], str],
) -> Report:
    """What was read and dropped, over all rows of the table; and what is trained on, over those taken.

    `where` names the file and the row of an example by its number in the column `row`.
    """
    examples = np.unique(taken)
    numbers = column_of(table, "row")

    def places(rows: Sequence[int] | np.ndarray, says: Sequence[str] | None = None) -> list[str]:
        first = [where(int(numbers[row])) for row in rows[:MOST_PLACES]]
        return first if says is None else [f"{x}{y}" for x, y in zip(first, says, strict=True)]

    reasons = pc.call_function(
        "if_else", [table.data.column("unreadable"), UNREADABLE, table.data.column("problem")]
    )
    dropped = {reason: rows for reason, rows in _by_text(reasons, np.arange(len(table))).items() if reason}
    found = _cut(table, taken) | _odd(table, examples)
    report: Report = {
        "source": name,
        "rows": len(table),
        "groups": len(taken),
        "dropped": {reason: len(rows) for reason, rows in dropped.items()},
        "tokens": int(column_of(table, "num_tokens")[taken].sum()),
        **{key: of.number for key, of in found.items()},
    }
    named = {reason: places(rows) for reason, rows in dropped.items()}
    if UNREADABLE in dropped:
        rows = dropped[UNREADABLE]
        named[UNREADABLE] = places(rows, [f": {table[int(row)]['problem']}" for row in rows[:MOST_PLACES]])
    for key, (_, rows, others) in found.items():
        named[key] = places(rows, others if others is None else [f" (as {x})" for x in places(others)])
    report |= _weights(table.select(taken))
    for key, column in LISTS.items():
        if by_text := _by_text(*_flattened(table, column, examples)):
            report[key] = {text: len(rows) for text, rows in by_text.items()}
            named |= {text: places(rows) for text, rows in by_text.items()}
    margins = flat_column(table.select(taken), "margins")
    margins = margins[~np.isnan(margins)]
    if len(margins):
        report |= {"margins": len(margins), **_spread("margin", margins)}
    return {**report, "where": {key: rows for key, rows in named.items() if rows}}


def _weights(groups: datasets.Dataset) -> Report:
    """How many examples have a weight or weight 0, and how the weights spread; nothing if none has any. An
    example with a weight for each completion counts with their mean."""
    counts, weights = column_of(groups, "num_weights"), flat_column(groups, "completion_weights")
    if not len(weights):
        return {}
    given = counts[counts > 0]
    of_rows = np.add.reduceat(weights, np.cumsum(given) - given) / given
    return {
        "rows_with_weight": len(given),
        "rows_of_weight_0": int((of_rows == 0).sum()),
        "rows_without_weight": len(counts) - len(given),
        **_spread("weight", weights),
        "weight_mean": float(of_rows.mean()),
    }


def with_known(
    report: Report,
    table: datasets.Dataset,
    taken: np.ndarray,  # (G,) as for `report_of`
    where: Callable[[int], str],
    known: KnownClaims,
    held_out: bool,
) -> Report:
    """The report with examples that repeat or contradict those of other tables, whose claims are known.

    Of a held-out table either makes it an example that is trained on. The claims of others become known.
    """
    examples = np.unique(taken)
    claims, makers = claims_in(table, examples)
    same, opposite = known.holds(claims), known.holds(claims ^ 1)
    counts: Report = {}
    if held_out:
        rows = {HELD_OUT: np.unique(makers[same | opposite])}
    else:
        counts = {NOT_KEPT: number} if (number := known.add(claims)) else {}
        among = _repeats(claims, makers, examples)  # which are in the report already
        repeated, contradicting = examples[among.repeated != NONE], examples[among.contradicted != NONE]
        rows = {
            "repeated_examples": np.setdiff1d(makers, np.append(makers[~same], repeated)),
            "contradicting_examples": np.setdiff1d(makers[opposite], contradicting),
        }
    numbers, named = column_of(table, "row"), dict(report["where"])
    for key, found in rows.items():
        places = [where(int(numbers[row])) for row in found[:MOST_PLACES]]
        named |= {key: [*named.get(key, []), *places][:MOST_PLACES]} if places else {}
    counts |= {key: report.get(key, 0) + len(found) for key, found in rows.items()}
    return {**report, **counts, "where": named}


def claims_in(
    table: datasets.Dataset,
    examples: np.ndarray,  # (n,) rows of the table
) -> tuple[np.ndarray, np.ndarray]:
    """(C,) the claims of these examples, and (C,) the row that makes each of them."""
    claims, makers = _flattened(table, "claims", examples)
    return claims.to_numpy(), makers


def _spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Extrema and mean of the values (N,)."""
    return {
        f"{name}_min": float(values.min()),
        f"{name}_max": float(values.max()),
        f"{name}_mean": float(values.mean()),
    }


def held_out_in_training(
    train: datasets.Dataset,  # tables of FEATURES, or selections of their rows
    held_out: datasets.Dataset,
) -> Report:
    """How many held-out examples are trained on, themselves or their texts the other way round."""
    known = KnownClaims()
    without_room = known.add(flat_column(train, "claims"))
    lists = lists_of(held_out, "claims")
    claims = lists.flatten().to_numpy()
    makers = np.repeat(np.arange(len(held_out)), pc.call_function("list_value_length", [lists]).to_numpy())
    shared = np.unique(makers[known.holds(claims) | known.holds(claims ^ 1)])
    counts = {HELD_OUT: len(shared), NOT_KEPT: without_room}
    return {key: count for key, count in counts.items() if count}


def _cut(
    table: datasets.Dataset,
    taken: np.ndarray,  # (G,)
) -> dict[str, _Found]:
    """What tokenising has changed in the groups, and examples that spell special tokens."""
    columns = {
        "truncated_completions": column_of(table, "truncated"),
        "groups_with_moved_boundary": column_of(table, "boundary_cut") > 0,
        "comparisons_of_equal_tokens": column_of(table, "equal"),
        UNSCORED: column_of(table, "num_completion_tokens") - column_of(table, "num_scored_tokens"),
    }
    spells = np.flatnonzero(column_of(table, "spells_special"))
    spelled = np.flatnonzero(column_of(table, "spelled_in_text"))
    return {
        **{key: _Found(int(x[taken].sum()), np.unique(taken[x[taken] > 0])) for key, x in columns.items()},
        "rows_that_spell_special_tokens": _Found(len(spells), spells),
        "texts_that_spell_special_tokens": _Found(len(spelled), spelled),
    }


def _odd(
    table: datasets.Dataset,
    examples: np.ndarray,  # (n,) rows, each once
) -> dict[str, _Found]:
    """What is odd about an example beside the others."""
    repeats = _repeats(*claims_in(table, examples), examples)
    margins, owners = _flattened(table, "margins", examples)
    sizes = np.abs(margins.to_numpy())
    median = np.median(sizes[sizes > 0]) if (sizes > 0).any() else np.inf
    far = sizes > FAR * median
    is_messages = column_of(table, "conversational")[examples]
    is_rarer = is_messages == (2 * is_messages.sum() <= len(examples))
    others = {
        "repeated_examples": repeats.repeated,
        "contradicting_examples": repeats.contradicted,
    }
    found = {}
    for key, other in others.items():
        rows = np.flatnonzero(other != NONE)
        found[key] = _Found(len(rows), examples[rows], examples[other[rows]])
    found["examples_of_the_rarer_kind"] = _Found(int(is_rarer.sum()), examples[is_rarer])
    found["margins_far_from_the_rest"] = _Found(int(far.sum()), np.unique(owners[far]))
    return found


def _repeats(
    claims: np.ndarray,  # (C,)
    makers: np.ndarray,  # (C,) rows
    examples: np.ndarray,  # (n,) rows
) -> Repeats:
    return find_repeats(claims, np.searchsorted(examples, makers), len(examples))


def _flattened(
    table: datasets.Dataset,
    name: str,
    examples: np.ndarray,  # (n,) rows
) -> tuple[pa.ChunkedArray, np.ndarray]:
    """(elements of these rows' lists in a column, the row that each of them belongs to)."""
    lists = table.data.column(name).take(pa.array(examples))
    sizes = pc.call_function("list_value_length", [lists]).to_numpy()
    return pc.call_function("list_flatten", [lists]), np.repeat(examples, sizes)


def _by_text(
    texts: pa.ChunkedArray,  # (n,)
    rows: np.ndarray,  # (n,)
) -> dict[str, np.ndarray]:
    """Text -> the rows that it belongs to, in alphabetical order."""
    distinct = sorted(pc.call_function("unique", [texts]).to_pylist())
    return {text: rows[pc.call_function("equal", [texts, text]).to_numpy()] for text in distinct}


def total_report(name: str, reports: Sequence[Report]) -> Report:
    """One report of several parts together."""
    facts = (fact for report in reports for fact in report.items())
    counts = dict.fromkeys(key for key, value in facts if isinstance(value, int) and key not in SPREADS)
    total: Report = {"source": name, **{key: sum(x.get(key, 0) for x in reports) for key in counts}}
    for key in ("dropped", *LISTS):
        counted = Counter[str]()
        for report in reports:
            counted.update(report.get(key, {}))
        if counted or key == "dropped":
            total[key] = dict(sorted(counted.items()))
    where: dict[str, list[str]] = {}
    for report in reports:
        for key, places in report["where"].items():
            where[key] = [*where.get(key, []), *places][:MOST_PLACES]
    return {**total, **_total_spread("margin", "margins", reports), **_total_weights(reports), "where": where}


def _total_weights(reports: Sequence[Report]) -> Report:
    """The numbers on weights of all parts together; groups of a part without weights have none."""
    spread = _total_spread("weight", "rows_with_weight", reports)
    if spread:
        spread["rows_of_weight_0"] = sum(x.get("rows_of_weight_0", 0) for x in reports)
        spread["rows_without_weight"] = sum(x.get("rows_without_weight", x["groups"]) for x in reports)
    return spread


def _total_spread(name: str, count: str, reports: Sequence[Report]) -> Report:
    """Number, under the key `count`, extrema and mean of margins or weights over all parts that have any."""
    having = [report for report in reports if count in report]
    if not having:
        return {}
    number = sum(x[count] for x in having)
    return {
        count: number,
        f"{name}_min": min(x[f"{name}_min"] for x in having),
        f"{name}_max": max(x[f"{name}_max"] for x in having),
        f"{name}_mean": sum(x[f"{name}_mean"] * x[count] for x in having) / number,
    }


RENDERED = 0.5
"""The share of examples with marks of turns in plain text, above which a template has been rendered."""


def on_marks_in_text(report: Report) -> list[str]:
    """What is to be said of special tokens and of marks of turns that texts and messages spell out."""
    lines = []
    number, rows = report.get("texts_that_spell_special_tokens", 0), report["rows"]
    if number > RENDERED * rows:
        lines.append(
            f"{number} of {rows} examples are text in which a chat template was rendered before: special "
            "tokens that it spells out are letters here; data.text_holds_special_tokens=true takes them as "
            "tokens"
        )
    elif number:
        lines.append(f"{number} examples spell out special tokens in plain text, where they are letters")
    mark, number = _most_frequent(report, "foreign_turn_marks")
    if number > RENDERED * rows:
        lines.append(
            f"{number} of {rows} examples are text with {mark}, as another model's chat template writes it: "
            "no token of this tokenizer, so it is letters; render the data with the right template"
        )
    mark, number = _most_frequent(report, "turn_marks_in_messages")
    if number > RENDERED * rows:
        lines.append(
            f"{number} of {rows} examples are conversations whose messages hold {mark}: a chat template was "
            "rendered into them before, and is written around them once more; take its marks out of the "
            "messages, or give the whole as plain text with data.text_holds_special_tokens=true"
        )
    return lines


def _most_frequent(report: Report, key: str) -> tuple[str, int]:
    return max(report.get(key, {}).items(), key=lambda x: x[1], default=("", 0))


def reasons_in(report: Report) -> str:
    """Why rows were dropped, and how many for each reason, for a message."""
    return "; ".join(
        f"{count}: {reason}{_first(report, reason)}" for reason, count in report["dropped"].items()
    )


def findings(report: Report) -> Iterator[str]:
    """A line for everything that was dropped, cut or is odd: how much of it, and the first example."""
    for reason, number in report["dropped"].items():
        yield f"{number:,} dropped: {reason}{_first(report, reason)}"
    for key, says in COUNTS.items():
        if report.get(key):
            yield f"{report[key]:,} {says}{_first(report, key)}"
    yield from on_marks_in_text(report)
    for key in ("odd_texts", "chat_template"):
        for text, number in report.get(key, {}).items():
            yield f"{number:,} examples: {text}{_first(report, text)}"
    if unused := report.get("unused_columns"):
        named = (
            f"{name} in {counted(number, 'example')}{_first(report, name)}" for name, number in unused.items()
        )
        yield f"not used: {', '.join(named)}"


def _first(report: Report, key: str) -> str:
    places = report.get("where", {}).get(key)
    return f" (first: {places[0]})" if places else ""
