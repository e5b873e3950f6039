"""Explain the keys of a config and the parameters of objectives, for the terminal and for docs/config.md.

python -m madpo.launch.keys docs/config.md    writes the page anew
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import fill

from madpo.trainer.config.describe import (
    BY_KIND,
    ON_A_RECIPE,
    ON_A_RUN,
    REQUIRED,
    Entry,
    SectionEntry,
    kind_of,
    kinds_of_objectives,
    parameters,
    sections,
)
from madpo.trainer.config.error_text import ON_POLICY, unknown_objective
from madpo.trainer.config.foreign_keys import counterpart, our_key
from madpo.trainer.config.schema import Config
from madpo.trainer.errors import UserError, closest
from madpo.trainer.objectives.build import ALIASES
from madpo.trainer.objectives.registry import OBJECTIVES

WIDEST = 110
NARROWEST = 60


def explain_keys(name: str | None, width: int | None) -> str:
    """What `madpo keys` prints of a section, an objective or a key; without a name, an overview.

    `width` is the terminal's; None, where there is none, puts each key on one line. Raises UserError for a
    name that is unknown.
    """
    if name is None:
        return _overview(width)
    known = {section.name: section for section in sections()}
    if name in ("objective", "objective.loss_type", "loss_type"):
        return _losses(width)
    if name in known and name:
        inside = [section for section in known.values() if f"{section.name}.".startswith(f"{name}.")]
        return "\n".join(_section(section, width) for section in inside)
    if (loss_type := ALIASES.get(name, name)) in OBJECTIVES:
        return _objective(loss_type, width)
    name = name.removeprefix("objective.")
    entries = [entry for section in known.values() for entry in section.entries]
    if found := [entry for entry in entries if f".{entry.key}".endswith(f".{name}")]:
        return _rows(found, width, with_recipes=True)
    if meanings := _parameter(name, width):
        return meanings
    if foreign := counterpart(name, Config):
        ours = (our_key(name, Config) or "").split(" and ")
        known_here = "\n".join(explain_keys(key, width) for key in ours if key)
        return f"{_filled(f'{name}: {foreign}', width)}\n{known_here}"
    if name.lower() in ON_POLICY:
        raise UserError(unknown_objective(name))
    every = {*known, *OBJECTIVES, *(entry.key for entry in entries)}
    every |= {entry.key.rpartition(".")[2] for entry in entries}
    near = closest(name, every)
    hint = f", did you mean {near!r}?" if near else "; madpo keys lists the sections and the objectives"
    raise UserError(f"{name}: no section, objective or key of that name{hint}")


def terminal_width() -> int | None:
    """The width that text is wrapped to; None if the output is a file or another program."""
    if not sys.stdout.isatty():
        return None
    return max(NARROWEST, min(shutil.get_terminal_size().columns, WIDEST))


def _overview(width: int | None) -> str:
    inside, outside = sections()[1:], sections()[0]
    kinds = kinds_of_objectives().items()
    parts = {
        "Sections: `madpo keys SECTION` lists the keys, `madpo keys KEY` explains one.": [
            (section.name, section.description) for section in inside if "." not in section.name
        ],
        "Keys outside of sections:": [(entry.key, entry.description) for entry in outside.entries],
        "Objectives, by what they learn from: `madpo keys LOSS` lists the parameters.": [
            (kind, ", ".join(names)) for kind, names in kinds
        ],
    }
    return "\n".join(f"{_filled(title, width)}\n\n{_columns(rows, width)}" for title, rows in parts.items())


def _losses(width: int | None) -> str:
    title = "objective.loss_type names what is learnt; `madpo keys LOSS` lists the parameters of one."
    rows = [(kind, ", ".join(names)) for kind, names in kinds_of_objectives().items()]
    return f"{_filled(title, width)}\n\n{_columns(rows, width)}"


def _section(section: SectionEntry, width: int | None) -> str:
    entries = section.entries
    if width is not None:  # the heading says the rest of their names
        entries = [entry._replace(key=entry.key.removeprefix(f"{section.name}.")) for entry in entries]
    return f"{_filled(f'{section.name}: {section.description}', width)}\n\n{_rows(entries, width)}"


def _objective(loss_type: str, width: int | None) -> str:
    objective = OBJECTIVES[loss_type]
    head = f"{loss_type}: {kind_of(objective)}\n{_filled(objective.equation, width)}\n"
    return f"{head}\n{_rows(parameters(loss_type), width) or 'It has no parameters.'}".rstrip() + "\n"


def _parameter(name: str, width: int | None) -> str:
    """A parameter of objectives: each of its meanings, and which objectives give it that one."""
    owners = dict[tuple[str, str], list[str]]()
    for loss_type in OBJECTIVES:
        for entry in parameters(loss_type):
            if entry.key == name:
                owners.setdefault((entry.description, entry.facts), []).append(loss_type)
    between = "; " if width is None else "\n"
    rows = [(name, between.join([*meaning, f"of {', '.join(losses)}"])) for meaning, losses in owners.items()]
    return _columns(rows, width)


def _rows(entries: list[Entry], width: int | None, with_recipes: bool = False) -> str:
    def text(entry: Entry) -> str:
        more = [f"in a recipe, another value {ON_A_RECIPE[entry.effect]}"] if with_recipes else []
        between = "; " if width is None else "\n"
        return between.join([entry.description, "; ".join([entry.facts, *more])])

    return _columns(((entry.key, text(entry)) for entry in entries), width)


def _columns(rows: Iterable[tuple[str, str]], width: int | None) -> str:
    """Names, and beside each of them its text, wrapped to the width."""
    rows = list(rows)
    column = max((len(name) for name, _ in rows), default=0) + 4
    is_below = width is not None and column > width // 2  # long names: the text stands below them
    column = 6 if is_below else column
    out = list[str]()
    for name, text in rows:
        first = f"  {name}".ljust(column)
        if is_below:
            out.append(first)
            first = " " * column
        for part in text.split("\n"):
            out.append(_filled(part, width, first, " " * column))
            first = " " * column
    return "\n".join(out) + "\n" if out else ""


def _filled(text: str, width: int | None, first: str = "", indent: str = "") -> str:
    if width is None:
        return first + text
    return fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def page() -> str:
    """The text of docs/config.md."""
    return "\n".join(_page())


def _page() -> Iterator[str]:
    yield "# Keys of a config\n"
    yield (
        "Every key, with the values it takes, its default, and whether a run that has begun can go on with "
        "another value. Where the value is fixed, a start with another one is refused; `--fresh` or another "
        "`output_dir` begins a new run. "
        "`madpo keys` prints the same in a terminal (`madpo keys optim`, `madpo keys lr`), and `madpo config "
        "my.yaml` prints your config with every key filled in and explained. This page is generated: "
        "`python -m madpo.launch.keys docs/config.md`.\n"
    )
    yield (
        "A key is given in the YAML file under its section, or on the command line as `section.key=value`. "
        "Besides the required keys, a config names a model (`model.model_name_or_path`) and a data set "
        "(`data.dataset_name`).\n"
    )
    for section in sections():
        yield f"## `{section.name}`\n" if section.name else "## Outside of sections\n"
        yield f"{_cell(section.description)[:1].upper()}{_cell(section.description)[1:]}.\n"
        yield "| key | values | default | meaning | in a run |"
        yield "|---|---|---|---|---|"
        for entry in section.entries:
            in_words = entry.default == REQUIRED or entry.key in BY_KIND
            default = entry.default if in_words else f"`{entry.default}`"
            run = "".join(ON_A_RUN[entry.effect])
            cells = f"`{entry.key}`", entry.values, default, _cell(entry.description), run
            yield f"| {' | '.join(cells)} |"
        yield ""
    yield "## `objective`\n"
    yield (
        "`loss_type` names the objective; its parameters stand beside it. [objectives.md](objectives.md) has "
        "them all, `madpo keys dpo` those of one.\n"
    )
    yield "| learns from | `loss_type` |"
    yield "|---|---|"
    for kind, names in kinds_of_objectives().items():
        yield f"| {kind} | {', '.join(f'`{name}`' for name in names)} |"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
