"""Find the models and data sets that a config names, and refuse what looks like a path and is not there.

The hub is asked for nothing that is a slip of the pen, because offline every question takes a minute. The
folder of a run stands for the model that the run exported.
"""

from __future__ import annotations

import os
from pathlib import Path

from madpo.trainer.config.hub import Kind, check_on_hub, download, is_cached
from madpo.trainer.config.schema import Config
from madpo.trainer.errors import UserError, closest
from madpo.trainer.files import check_path

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MODEL_FILES = ("config.json", "adapter_config.json")
MODELS = ("model_name_or_path", "ref_model_name_or_path")
"""Keys of the section `model` that name one."""
RUN_FILES = ("config.yaml", "checkpoints")
MOST_SHOWN = 10
"""Names of a folder that a message lists."""


def located(config: Config) -> Config:
    """The config with its models where they are: a run folder is replaced by the model in it.

    Raises UserError for a model, a tokenizer or a data set that is not there, or is no such thing.
    """
    names = (*MODELS, "tokenizer_name_or_path")
    given = {name: getattr(config.model, name) for name in names}
    found = {name: _folder(f"model.{name}", value) for name, value in given.items() if value is not None}
    update: dict[str, object] = {"model": config.model.model_copy(update=found)}
    base = None if config.peft is None else config.peft.base_model_name_or_path
    if config.peft is not None and base is not None:
        own = {"base_model_name_or_path": _folder("peft.base_model_name_or_path", base)}
        update["peft"] = config.peft.model_copy(update=own)
    check_data(config)
    return config.model_copy(update=update)


def check_models(config: Config) -> None:
    """Raise UserError if a folder that the config names as a model holds none. Data alone can be looked at
    with a folder that holds a tokenizer."""
    for name in MODELS:
        if (value := getattr(config.model, name)) is not None:
            model_folder(f"model.{name}", value)


def check_data(config: Config) -> None:
    """Raise UserError for a data set that looks like a path and is not there."""
    parts = config.data.datasets
    keys = ["data.dataset_name"] if parts is None else [f"data.datasets.{n}.path" for n in range(len(parts))]
    for key, name in zip(keys, config.data.names, strict=True):
        check_there(key, name, "dataset")


def model_folder(key: str, name: str) -> str:
    """The folder of the model or adapter that `key` names, or its name on the hub.

    Raises UserError for a path that is not there, a file, a run that has exported no model, and a folder that
    holds something else.
    """
    folder = _folder(key, name)
    path = Path(folder)
    if path.is_dir() and not _holds_model(path):
        raise UserError(f"{key}: {name} holds no model: no {' and no '.join(MODEL_FILES)}{_holds(path)}")
    return folder


def _folder(key: str, name: str) -> str:
    """The folder that `key` names, of a run the one with its model, or a name on the hub."""
    check_path(name, key)
    path = Path(os.path.expanduser(name))
    if not os.path.exists(path):
        check_there(key, name, "model")
        return name
    if not path.is_dir():
        raise UserError(f"{key}: {name} is a file; name the folder that it is in")
    if not _holds_model(path):
        if _holds_model(path / "model"):
            return str(path / "model")
        if any((path / file).exists() for file in RUN_FILES):
            raise UserError(
                f"{key}: {name} is the folder of a run that has exported no model; write one with "
                f"`madpo export {name}`"
            )
    return str(path) if name.startswith("~") else name


def check_there(key: str, name: str, kind: Kind) -> None:
    """Raise UserError for a name that looks like a path, or like a slip for one, and is not there; and for
    one on the hub that cannot be had."""
    check_path(name, key)
    path = Path(os.path.expanduser(name))
    if os.path.exists(path):
        return
    near = _nearest_path(path)
    hint = f"; did you mean {near}?" if near else _holds(path.parent)
    if _looks_local(name):
        raise UserError(f"{key}: {name}: no such file or folder{hint}")
    if near is not None and not is_cached(name, kind):
        raise UserError(
            f"{key}: {name}: no such file or folder{hint} (If it is on the hub: {download(name, kind)})"
        )
    check_on_hub(key, name, kind)


def _looks_local(name: str) -> bool:
    parent = Path(name).parent
    return (
        name.startswith((".", "/", "~"))
        or name.endswith(DATA_SUFFIXES)
        or name.count("/") > 1
        or (parent != Path() and parent.is_dir())
    )


def _nearest_path(path: Path) -> Path | None:
    """The path that is there and that `path` is a slip for; None if there is none."""
    here = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        close = part if (here / part).exists() else closest(part, _names_in(here))
        if close is None:
            return None
        here /= close
    return here


def _holds(folder: Path) -> str:
    """The end of a message: what is in the folder where something was looked for."""
    if not folder.is_dir():
        return f"; there is no folder {folder} either"
    names = _names_in(folder)
    more = ", ..." if len(names) > MOST_SHOWN else ""
    return f"; {folder.resolve()} holds {', '.join(names[:MOST_SHOWN]) or 'nothing'}{more}"


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError:
        return []


def _holds_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in MODEL_FILES)
