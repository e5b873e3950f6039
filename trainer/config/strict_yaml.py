"""Strict YAML: duplicate keys are errors, `1e-6` is a float; dotted overrides."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml
from yaml.composer import ComposerError

from madpo.trainer.errors import UserError, closest, on_one_line
from madpo.trainer.files import check_path
from madpo.trainer.masking import masked, masked_text

MOST_VALUES, MOST_LEVELS = 100_000, 50
"""Values of a file, with every alias written out, and levels of them."""


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys, and files that their aliases let grow without bounds.

    It reads scalars as YAML 1.2: `no` and `1:30` are text, `010` is ten, `1e-6` is a float.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _size_of(node, 1, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = True) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text; quote it", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice; remove one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _Size(NamedTuple):
    """What is below a node with every alias written out."""

    values: int
    levels: int


def _size_of(node: yaml.Node, level: int, known: dict[yaml.Node, _Size]) -> _Size:
    """The size of a node at this level. Raises ComposerError if it is more than a config may have."""
    if node in known:
        return known[node]
    children: list[yaml.Node] = []
    if level <= MOST_LEVELS and isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif level <= MOST_LEVELS and isinstance(node, yaml.SequenceNode):
        children = node.value
    below = [_size_of(child, level + 1, known) for child in children]
    size = _Size(1 + sum(child.values for child in below), 1 + max((x.levels for x in below), default=0))
    if max(level, size.levels) > MOST_LEVELS or size.values > MOST_VALUES:
        problem = (
            f"more than {MOST_VALUES:,} values or {MOST_LEVELS} levels, with every alias (*name) written out"
        )
        raise ComposerError(None, None, problem, node.start_mark)
    known[node] = size
    return size


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes text which this module or another YAML reader would take for something else."""


_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
for _tag, _pattern, _first in _SCALARS:
    for _class in (_StrictLoader, _StrictDumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), _first)
_StrictLoader.add_constructor("tag:yaml.org,2002:map", _StrictLoader.construct_mapping)
_StrictLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(str(node.value)))


def parse(text: str, origin: str) -> Any:
    """Parse a YAML text. UserError names `origin` and the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{origin}{_explain(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: {on_one_line(error)}") from None
    except RecursionError:
        raise UserError(f"{origin}: nested too deeply") from None
    except ValueError as error:  # Python reads no whole number of thousands of digits
        raise UserError(f"{origin}: {error}") from None


_IN_OTHER_WORDS = {
    r"found character '\\t' .*": "a tab; indent with spaces",
    r"found character ('.') that .*": r"a value that begins with \1; quote it",
    r"found undefined alias .*|expected alphabetic .*": "a value that begins with * or &; quote it",
    r"expected '?<(document start|block end)>.*": "a line that is indented otherwise than those beside it",
    r"mapping values are not allowed here": "a second colon in a line, or a line that is indented too far",
    r"could not find expected ':'": "a key without a colon behind it",
    r"found unexpected end of stream": "a quote that is not closed",
    r"expected ',' or '.'.*|expected the node content.*": "a bracket that is not closed, or a comma missing",
}
"""What yaml says of a text -> what is wrong with it."""
_FROM_ITS_BEGINNING = tuple(_IN_OTHER_WORDS)[-3:]
"""Those of which yaml notices only further down that something is missing."""


def _explain(error: yaml.MarkedYAMLError) -> str:
    """The place and the fault, in our words for what people do."""
    mark, said = error.problem_mark, error.problem or ""
    for pattern, words in _IN_OTHER_WORDS.items():
        if match := re.fullmatch(pattern, said):
            said = match.expand(words)
            mark = error.context_mark if pattern in _FROM_ITS_BEGINNING and error.context_mark else mark
            break
    return f":{mark.line + 1}: {said}" if mark else f": {said}"


DATA_FILES = (".jsonl", ".parquet", ".csv", ".arrow")


def read(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. UserError names the file and line."""
    check_path(path)
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a YAML file")
    if not path.is_file():
        near = closest(path.name, [file.name for file in path.parent.glob("*")])
        raise UserError(f"{path}: no such file" + (f", did you mean {path.with_name(near)}?" if near else ""))
    if path.suffix in DATA_FILES:
        raise UserError(
            f"{path}: a data set, and a config is wanted; madpo init my.yaml writes one, in which "
            f"data.dataset_name names the data set"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: a config is a YAML file, and this is no text in UTF-8 (byte "
            f"{error.start}); save it as such"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    value = parse(text, str(path))
    if value is None:
        raise UserError(f"{path}: the file is empty")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise UserError(f"{path}: a config is a mapping of sections, and this is {kind}")
    return value


def dump(tree: dict[str, Any]) -> str:
    """Write a mapping as YAML; `parse` reads it back as an equal mapping."""
    return yaml.dump(tree, Dumper=_StrictDumper, sort_keys=False, width=100)


def override(tree: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=value` assignments to a copy of `tree`. Values are YAML; a mapping replaces the old one."""
    tree = dict(tree)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        keys = path.split(".")
        if not separator or not all(keys):
            raise UserError(f"override {assignment!r}: write section.key=value, as in optim.lr=2e-6")
        node = tree
        for depth, key in enumerate(keys[:-1]):
            child = node.get(key)
            if child is not None and not isinstance(child, dict):
                where = ".".join(keys[: depth + 1])
                raise UserError(
                    f"override {assignment!r}: {where} is a value, not a section; an override of {where} "
                    f"gives all of it, as in '{where}={{...}}'"
                )
            node[key] = dict(child or {})
            node = node[key]
        node[keys[-1]] = _value(assignment, text)
    return tree


def _value(assignment: str, text: str) -> Any:
    """The value of an override. UserError: where a blank has cut it, that is said."""
    cut = any(text.count(opening) > text.count(closing) for opening, closing in ("{}", "[]"))
    hint = "; if the shell has cut it at a blank, quote it whole, as in 'peft={lora_r: 8}'" if cut else ""
    try:
        return parse(text, f"override {assignment!r}")
    except UserError as error:
        raise UserError(f"{error}{hint}") from None


def masked_override(assignment: str) -> str:
    """An `a.b=value` assignment with its secrets masked."""
    path = assignment.partition("=")[0]
    try:
        tree = override({}, [assignment])
    except UserError:
        return masked_text(assignment)
    value, shown = (reduce(getitem, path.split("."), found) for found in (tree, masked(tree)))
    return assignment if shown == value else f"{path}={json.dumps(shown)}"


def named_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) for every text in a tree; items of a list have the list's key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from named_texts(child, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for child in value:
            yield from named_texts(child, key)
