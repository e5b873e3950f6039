"""Read the keys of another trainer's config: YAML, JSON, a Python or a shell script. Nothing is run."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from madpo.launch.convert import python_script
from madpo.trainer.config import strict_yaml
from madpo.trainer.errors import UserError
from madpo.trainer.files import check_path


@dataclass
class Source:
    """What a file says."""

    keys: dict[str, Any]
    program: str = ""  # the command, module or class that it calls
    gpus: int | None = None
    by_hand: list[str] = field(default_factory=list)  # values that only running it would give


def read(path: Path) -> Source:
    """The keys that a file sets. Raises UserError for a file that is none of a trainer's configs."""
    check_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        keys, program, by_hand = python_script.read(text, str(path))
        return Source(keys, program, by_hand=by_hand)
    if path.suffix == ".json":
        try:
            keys = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    elif path.suffix in (".yaml", ".yml"):
        keys = strict_yaml.parse(text, str(path))
    else:
        return _command_line(text, path)
    if not isinstance(keys, dict):
        raise UserError(f"{path}: a config is a mapping of keys, got {type(keys).__name__}")
    return Source(keys)


PROGRAM = re.compile(
    r"(openrlhf\.cli\.train_\w+|\btrl +\w+|\b\w*(?:train_)?(?:dpo|sft|rm|reward|kto|orpo|cpo)\w*\.py)\b"
)
GPUS = re.compile(r"--(?:num_gpus|num_processes|nproc[-_]per[-_]node)[= ]+\"?(\d+)")


def _command_line(text: str, path: Path) -> Source:
    """The flags of the first command of a shell script that trains."""
    text = _with_variables(re.sub(r"\\\n", " ", text))
    for line in text.splitlines():
        found = None if line.lstrip().startswith("#") else PROGRAM.search(line)
        if found is None:
            continue
        gpus = GPUS.search(text)
        source = Source({}, _program(found[1]), int(gpus[1]) if gpus else None)
        _flags(shlex.split(line[found.end() :], comments=True), source)
        config = source.keys.pop("config", None)
        if config is None:
            return source
        inner = read(path.parent / str(config) if not Path(str(config)).is_file() else Path(str(config)))
        return Source({**inner.keys, **source.keys}, source.program, source.gpus, source.by_hand)
    raise UserError(
        f"{path}: no command that trains; what is read: .yaml, .json and .py files, and shell scripts that "
        "call openrlhf.cli.train_*, trl, or a script such as dpo.py"
    )


def _program(name: str) -> str:
    """The program in one word: `dpo` for `trl dpo` and `scripts/dpo.py`, the module for OpenRLHF."""
    return (
        name if name.startswith("openrlhf") else name.removesuffix(".py").split()[-1].removeprefix("train_")
    )


def _flags(words: list[str], source: Source) -> None:
    name, values = "", list[str]()

    def close() -> None:
        if name:
            source.keys[name] = _value(values)
            if any("$" in value for value in values):
                source.by_hand.append(f"{name}: {' '.join(values)} is a variable of the shell")

    for word in words:
        if word.startswith("--") and len(word) > 2:
            close()
            name, _, value = word[2:].partition("=")
            values = [value] if value else []
        elif re.fullmatch(r"[|&;>]+|EOF", word):
            break
        else:
            values.append(word)
    close()


def _value(values: list[str]) -> Any:
    """A flag's value: true without any, a list of several; texts are read as YAML."""
    read = [
        {"True": True, "False": False}.get(x, strict_yaml.parse(x, x) if "{" not in x else x) for x in values
    ]
    return True if not read else read[0] if len(read) == 1 else read


def _with_variables(text: str) -> str:
    """The script with `$NAME` and `${NAME:-default}` replaced, where the script itself says the value."""
    known = dict(re.findall(r"^(?:export +)?(\w+)=[\"']?([^\s\"']+)[\"']?$", text, flags=re.MULTILINE))
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: known.get(found[1], found[2]), text)
    return re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], found[0]), text)
