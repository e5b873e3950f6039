"""The manifest of a checkpoint: what the run was, and the size and checksum of every file.

It is written last, before the rename that commits the checkpoint. It holds plain JSON with a checksum of its
own, so that neither an edit nor a flipped bit goes unnoticed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from madpo.trainer.checkpoints.folders import MANIFEST, step_of
from madpo.trainer.files import Entry, hash_of_file, write_atomically
from madpo.trainer.state import TrainState

FORMAT = 1
MISSING = "is missing"


class DamagedError(Exception):
    """Why a checkpoint cannot be taken: which file, and what is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    state: TrainState
    identity: dict[str, Any]  # dotted key -> value: what the run was made with
    world_size: int
    zero_stage: int
    life: int  # which start of the run has written it, counted from 1
    versions: dict[str, str]  # package -> version
    files: dict[str, Entry]  # path inside the checkpoint -> entry

    def write(self, folder: Path) -> None:
        """Write it into the folder of the checkpoint, onto the disk."""
        content = dataclasses.asdict(self)
        whole = {"format": FORMAT, "checksum": _checksum(content), "content": content}
        write_atomically(folder / MANIFEST, json.dumps(whole, indent=1) + "\n")


def read(checkpoint: Path) -> Manifest:
    """The manifest in a checkpoint's folder. Raises DamagedError unless it is as it was written."""
    path = checkpoint / MANIFEST
    try:
        if (fault := _fault_of_place(path)) is not None:
            raise DamagedError(f"has no {MANIFEST}" if fault == MISSING else f"{MANIFEST} {fault}")
        whole = json.loads(path.read_bytes())
    except OSError as error:
        raise DamagedError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DamagedError(f"{MANIFEST} is no JSON") from None
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST} is of no format known here")
    content = whole.get("content")
    if not isinstance(content, dict) or whole.get("checksum") != _checksum(content):
        raise DamagedError(f"{MANIFEST} has changed since it was written")
    try:
        files = {name: Entry(**entry) for name, entry in content["files"].items()}
        manifest = Manifest(**{**content, "state": TrainState(**content["state"]), "files": files})
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} is of no format known here ({error})") from None
    if manifest.state.step != step_of(checkpoint.name):
        raise DamagedError(f"it is of step {manifest.state.step}")
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DamagedError(f"{MANIFEST} names {name!r}, which is outside")
    return manifest


def fault_in(checkpoint: Path, files: Mapping[str, Entry], names: Iterable[str]) -> str | None:
    """What is wrong with the files of these names, as text for the user; None if nothing is."""
    for name in names:
        path, entry = checkpoint / name, files[name]
        try:
            if (fault := _fault_of_place(path)) is not None:
                return f"{name} {fault}"
            if (size := path.stat().st_size) != entry.size:
                return f"{name} has {size:,} bytes, {entry.size:,} were written"
            if hash_of_file(path) != entry.checksum:
                return f"{name} has changed since it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _fault_of_place(path: Path) -> str | None:
    """Why nothing is read from a path, as text for the user; a pipe or a device would have no end."""
    if path.is_symlink():
        return "is a link"
    if path.is_file():
        return None
    return "is no file" if path.exists() else MISSING


def _checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
