"""The converted config as YAML with comments, and the list of what did not come over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from madpo.launch.convert.draft import Draft, Fate
from madpo.trainer.config import strict_yaml
from madpo.trainer.config.effects import sections_in
from madpo.trainer.config.schema import Config
from madpo.trainer.masking import masked

HEADINGS = {
    Fate.CHANGED: "done in another way",
    Fate.LOST: "not done here",
    Fate.UNKNOWN: "unknown, not read",
}
COMMANDS = {"sft": "madpo sft", "reward": "madpo reward"}
COLUMN = 44
"""Where comments begin."""
WIDTH = 40
"""The longest value that is shown whole."""


def tree_of(draft: Draft) -> dict[str, Any]:
    """The config as a nested mapping, sections and keys in the schema's order."""
    tree = dict[str, Any]()
    for key in sorted(draft.config, key=lambda key: (_place(key), key.count("."))):
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = draft.config[key]
    return tree


def _place(key: str) -> tuple[int, int]:
    section, _, name = key.partition(".")
    inner = next(sections_in(Config.model_fields[section]), None)
    names = list(inner.model_fields) if inner else []
    return list(Config.model_fields).index(section), names.index(name) if name in names else 0


def yaml_text(draft: Draft, file: str) -> str:
    """The config as YAML: beside a value where it comes from, and below what did not come over."""
    lines = [
        f"# {file}, a config of {draft.peer}, by madpo convert. Comments name the keys that values come from,"
    ]
    lines += ["# where they have other names here, and below what did not come over."]
    lines += _lines(draft, tree_of(draft), ())
    lines += [f"# {line}".rstrip() for line in list_text(draft).splitlines()]
    return "\n".join(lines) + "\n"


def _lines(draft: Draft, tree: dict[str, Any], parents: tuple[str, ...]) -> Iterator[str]:
    indent = "  " * len(parents)
    for name, value in tree.items():
        place = (*parents, name)
        origin = draft.origins.get(".".join(place))
        if origin is None and isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _lines(draft, value, place)
            continue
        first, *rest = strict_yaml.dump({name: value}).splitlines()
        comment = "" if origin in (None, name) else f"  # {origin}"
        yield f"{indent}{first}".ljust(COLUMN if comment else 0) + comment
        yield from (f"{indent}{line}" for line in rest)


def list_text(draft: Draft) -> str:
    """What did not come over as it was, each with the reason, and what is left to do."""
    lines = list[str]()
    for fate, heading in HEADINGS.items():
        found = {name: verdict.why for name, verdict in draft.verdicts.items() if verdict.fate is fate}
        lines += [f"{heading}:"] if found else []
        lines += [_line(draft, name, why) for name, why in found.items()]
    for heading, notes in (("also different", draft.remarks), ("to do by hand", draft.by_hand)):
        lines += [f"{heading}:"] if notes else []
        lines += [f"  {note}" for note in dict.fromkeys(notes)]
    return "".join(f"{line}\n" for line in lines)


def _line(draft: Draft, name: str, why: str) -> str:
    value = json.dumps(masked(draft.given)[name], ensure_ascii=False)
    short = value if len(value) <= WIDTH else f"{value[:WIDTH]}..."
    return f"  {draft.spelling.get(name, name)}: {short}" + (f"  ({why})" if why else "")


def summary(draft: Draft, file: str) -> str:
    """One line: what the file was, and how many of its keys came over."""
    total, same = len(draft.verdicts), draft.count(Fate.TAKEN)
    return (
        f"{file}: {draft.peer}, {draft.task}: of {total} keys {same} mean the same here, "
        f"{draft.count(Fate.CHANGED)} are done in another way, {draft.count(Fate.LOST)} are not done, "
        f"{draft.count(Fate.UNKNOWN)} are unknown"
    )


def next_command(draft: Draft, file: str) -> str:
    """The command that trains with the result."""
    return f"{COMMANDS.get(draft.task, 'madpo train')} {file}"
