"""One example -> its text group: columns are renamed, an adapter reads them, edges are selected."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from madpo.trainer.errors import UserError
from madpo.trainer.formats.adapters import ADAPTERS, Adapter
from madpo.trainer.formats.chat_message import (
    keys_beside_text,
    not_null,
    says_something,
    unknown_keys,
    without_weights,
)
from madpo.trainer.formats.json_lines import read_json
from madpo.trainer.formats.messages import one_of
from madpo.trainer.formats.numbers import (
    LABELS,
    MARGIN_COLUMNS,
    MARGINS_DIFFER,
    as_weight,
    has_label,
    is_rating,
    label_of,
    lone_scores,
    margin_of,
    margins_differ,
)
from madpo.trainer.formats.text_groups import (
    LAYOUTS,
    TextGroup,
    best_only,
    layout_of,
    texts_of,
    with_edges,
    with_system,
)

Edge = tuple[int, int, float | None]
Which = Literal["all", "adjacent", "best_worst"]

OWNED_TEMPLATE_KWARGS = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "tokenize", "padding"),
    *("continue_final_message", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
}
"""Options of `apply_chat_template` that madpo sets itself, so that data and config may not."""


@dataclass(frozen=True)
class RowRules:
    """What decides, besides the example itself, which group it becomes; part of the cache key."""

    adapter: str = "auto"
    columns: dict[str, str] = field(default_factory=dict, hash=False)  # our column name -> the source's
    edges: Which = "all"
    ignore: tuple[str, ...] = ()  # columns that are not to be used


def choose_adapter(columns: Iterable[str], rules: RowRules, supervised: bool = False) -> str:
    """The name of the adapter for a source with these columns.

    Raises UserError for a renamed column that is not there, for an adapter that lacks a column, for columns
    that `auto` does not recognise, which says which adapter comes nearest, and for a column that is spelled
    almost as one that would be used.
    """
    columns = set(columns)
    for ours, theirs in rules.columns.items():
        if theirs not in columns:
            raise UserError(f"data.columns: {ours}: {theirs}: no such column; there are {sorted(columns)}")
    names = columns - set(rules.columns.values()) | rules.columns.keys()
    if rules.adapter == "auto":
        try:
            layout = layout_of(names, supervised)
        except UserError as error:
            _check_spelling(names, rules, frozenset().union(*(needed for _, needed in LAYOUTS)))
            raise UserError(f"{error}{_nearest(names)}") from None
        _check_spelling(names, rules, ADAPTERS[layout].uses)
        return layout
    _check_spelling(names, rules, ADAPTERS[rules.adapter].uses)
    missing = ADAPTERS[rules.adapter].missing(names)
    if missing:
        raise UserError(
            f"data.adapter: {rules.adapter} needs the column {', '.join(missing)}; there are "
            f"{sorted(columns)}; rename with data.columns"
        )
    return rules.adapter


def _check_spelling(names: set[str], rules: RowRules, used: frozenset[str]) -> None:
    """Raise UserError for a column that is one of those used but for capitals, or blanks or a byte order mark
    at its ends, if that one is not there."""
    others = names - used - BESIDE_ALL
    if not others:
        return
    known = used | BESIDE_ALL
    for name in sorted(others - set(rules.ignore)):
        plain = name.strip("\ufeff \t\r\n").lower()
        if plain in known - names:
            raise UserError(
                f"column {name!r} is not {plain}; set data.columns={{{plain}: {name!r}}} to use it, or "
                f"data.ignore_columns=[{name!r}] to leave it out"
            )


def _nearest(names: set[str]) -> str:
    """The end of an error message: the adapters that fit these columns, or lack the fewest."""
    missing = {name: adapter.missing(names) for name, adapter in ADAPTERS.items()}
    near = [name for name, lacks in missing.items() if len(lacks) < len(ADAPTERS[name].needs)]
    rename = "rename yours with data.columns, ours first, as in data.columns={prompt: question, chosen: good}"
    if not near:
        return f"; {rename}"
    fitting = [name for name in near if not missing[name]]
    if fitting:
        return f"; data.adapter={' or '.join(fitting)} reads these"

    def distance(name: str) -> tuple[float, int]:
        needs = len(ADAPTERS[name].needs)
        return len(missing[name]) / needs, -needs

    nearest = min(near, key=distance)
    if distance(nearest)[0] >= MISLEADING:
        return f"; {rename}"
    return f"; nearest is {nearest}, which lacks {', '.join(missing[nearest])}: {rename}"


MISLEADING = 0.5
"""A layout that lacks this share of its columns is not worth a mention."""


def read_row(row: dict[str, Any], adapter: Adapter, rules: RowRules, supervised: bool = False) -> TextGroup:
    """The group of an example. Raises UserError that names the field, its value and what it should hold."""
    replaced = _replaced(row, rules)
    given = {name: value for name, value in renamed(row, rules.columns).items() if name not in rules.ignore}
    row = {name: bytes_as_text(value) for name, value in given.items()}
    _check_spelling(set(row), rules, adapter.uses)
    group = _with_weight(adapter.read(row), row.get("weight"))
    used = (adapter.uses | BESIDE_EVERY) - lone_scores(row)
    if len(group.completions) == 1:
        used -= MARGIN_COLUMNS
    if len(group.completions) == 1 and has_label(row):
        labels = group.labels or [label_of(row, is_needed=False)]
        group, used = replace(group, labels=labels), used | {*LABELS}
    group = best_only(group) if supervised else _with_margin(choose_edges(group, rules.edges), margin_of(row))
    if group.conversational:
        used |= {*FOR_TEMPLATES}
        group = replace(group, tools=_tools(row), template_kwargs=_template_kwargs(row))
        if not adapter.source:
            used |= {*SYSTEM}
            group = with_system(group, row.get(one_of(row, *SYSTEM) or SYSTEM[0]))
        group = _with_keys_looked_at(group)
    odd = [
        *group.odd,
        *([FROM_BYTES] if row != given else []),
        *([MARGINS_DIFFER] if margins_differ(row) else []),
    ]
    unused = (*group.unused, *replaced, *_unused(row, used, adapter, group))
    if group.conversational:
        looked_at = [value for name, value in row.items() if name in adapter.uses]
        unused += tuple(f"{key} (of parts of text)" for key in sorted(keys_beside_text(looked_at)))
    return replace(group, unused=unused, odd=tuple(odd))


FROM_BYTES = "bytes were read as UTF-8 text"


def bytes_as_text(value: Any) -> Any:
    """The value with text in place of bytes that are UTF-8, as Parquet may store text; others stay."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return [bytes_as_text(x) for x in value]
    return {key: bytes_as_text(x) for key, x in value.items()} if isinstance(value, dict) else value


def _with_keys_looked_at(group: TextGroup) -> TextGroup:
    """The conversation with the unknown keys of its messages, and without weights in its prompt."""
    completions = [message for x in group.completions if not isinstance(x, str) for message in x]
    assert not isinstance(group.prompt, str)
    unknown = unknown_keys([*group.prompt, *completions])
    return replace(group, prompt=without_weights(group.prompt), unknown_keys=tuple(unknown))


SYSTEM = ("system", "system_prompt")
FOR_TEMPLATES = ("tools", "chat_template_kwargs")

BESIDE_EVERY = MARGIN_COLUMNS | {"weight"}
"""Columns that are used beside those of every layout and format, margins where completions are compared."""

BESIDE_ALL = BESIDE_EVERY | {*LABELS, *SYSTEM, *FOR_TEMPLATES}
"""Columns that are used beside those of some: single completions, conversations."""

MEANT = {
    *SYSTEM,
    *("instruction", "question", "input", "context", "history", "tools"),
    *("image", "images", "video", "videos", "audio", "audios"),
}
"""Names of columns that belong to what the model should read."""


def _unused(
    row: dict[str, Any], used: AbstractSet[str], adapter: Adapter, group: TextGroup
) -> tuple[str, ...]:
    """The columns that hold text or more, a rating or a label, and that nothing looks at. One that repeats a
    text of the example is none of them. Raises UserError for one of MEANT."""
    beside = {name: value for name, value in row.items() if name not in used}
    labels = LABELS if has_label(row) else ()
    unused = [
        name
        for name, value in beside.items()
        if name in labels or says_something(value) or is_rating(name, value)
    ]
    if unused:
        said = {text.strip() for text in texts_of(group)}
        unused = [x for x in unused if not (isinstance(beside[x], str) and beside[x].strip() in said)]
    for name in unused:
        if name in MEANT:
            place = "beside conversations" if group.conversational else "beside plain text"
            advice = _instead(name, row, adapter)
            raise UserError(
                f"{name}: {place}, {adapter.name} does not use this column; {advice}set "
                f"data.ignore_columns=[{name}] to leave it out"
            )
    return tuple(unused)


def _instead(name: str, row: dict[str, Any], adapter: Adapter) -> str:
    """The adapters that use this column beside the others, which one reads now, as the beginning of an
    advice."""
    given = {column for column, value in row.items() if says_something(value)}
    using = [x for x in ADAPTERS.values() if name in x.uses and x.source]
    read = (given & adapter.uses) - {"prompt"}
    if fitting := [x.name for x in using if not x.missing(given)]:
        return f"data.adapter={' or '.join(fitting)} does; else "
    for x in using:
        missing = x.missing(given)
        if len(missing) == 1 and "prompt" in given - x.uses and read <= x.uses:
            ours = missing[0].split(" or ")[0]
            return f"data.adapter={x.name} with data.columns={{{ours}: prompt}} does; else "
    return ""


def _with_weight(group: TextGroup, value: Any) -> TextGroup:
    """The group with the example's own weight, if it has one. A list has been read with the completions."""
    if value is None or group.completion_weights:
        return group
    if isinstance(value, list):
        raise UserError(
            f"weight: expected one number, got {value!r:.80}; a list goes with the columns completions and "
            "scores, a number for each completion"
        )
    return replace(group, weight=as_weight(value, "weight"))


def _with_margin(group: TextGroup, margin: float | None) -> TextGroup:
    """The group with the example's own margin, if it has one and a single edge; the adapter's otherwise."""
    if margin is None or not group.edges:
        return group
    if len(group.edges) > 1:
        raise UserError(
            f"margin: one number, and the row makes {len(group.edges)} comparisons; set "
            "data.edges=best_worst, or give scores"
        )
    return replace(group, edges=[(*group.edges[0][:2], margin)])


def renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The example under our column names. A renamed column keeps no old name."""
    old_names = set(columns.values())
    others = {name: value for name, value in row.items() if name not in old_names}
    return {**others, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def _replaced(row: dict[str, Any], rules: RowRules) -> list[str]:
    """The columns with something in them whose name `data.columns` gives to another one."""
    renames, kept = rules.columns.items(), {*rules.columns.values(), *rules.ignore}
    return [
        f"{ours} (data.columns reads {theirs} in its place)"
        for ours, theirs in renames
        if ours not in kept and row.get(ours) not in (None, "", [], {}, row.get(theirs))
    ]


def choose_edges(group: TextGroup, which: Which) -> TextGroup:
    """The group with the edges that `data.edges` selects, and the completions that they compare.

    all: every edge. adjacent: edges with no completion between chosen and rejected. best_worst: edges between
    a completion that nothing beats and one that beats nothing. A group of one pair is never changed.
    """
    if not group.edges:
        return group
    pairs = {(winner, loser) for winner, loser, _ in group.edges}
    beaten, beating = {loser for _, loser in pairs}, {winner for winner, _ in pairs}

    def keep(winner: int, loser: int) -> bool:
        if which == "adjacent":
            return not any((winner, x) in pairs and (x, loser) in pairs for x in beaten & beating)
        return which == "all" or (winner not in beaten and loser not in beating)

    return with_edges(group, [edge for edge in group.edges if keep(edge[0], edge[1])])


def _tools(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The column `tools`: a list of JSON schemas, or its JSON text."""
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = read_json(value) if value.strip() else None
        except UserError as error:
            raise UserError(f"tools: {error}") from None
        except ValueError:
            raise UserError(f"tools: expected JSON, got {value!r:.80}") from None
    if value is None:
        return []
    if not isinstance(value, list) or not all(map(_is_schema, value)):
        raise UserError(f"tools: expected a list of JSON schemas, got {value!r:.80}")
    return value


def _is_schema(tool: Any) -> bool:
    """Whether this is an object that says something, as its `function` does if it has one."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and bool(function)


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    value = row.get("chat_template_kwargs")
    if value is not None and not isinstance(value, dict):
        raise UserError(f"chat_template_kwargs: expected an object, got {value!r:.80}")
    return check_template_kwargs(not_null(value or {}), "chat_template_kwargs: ")


def check_template_kwargs(kwargs: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`kwargs`. Raises UserError if madpo sets one of them itself."""
    owned = ", ".join(sorted(OWNED_TEMPLATE_KWARGS.intersection(kwargs)))
    if owned:
        raise UserError(f"{prefix}{owned}: madpo sets this itself; give variables of the template")
    return kwargs
