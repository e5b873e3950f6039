"""Hashes of the files and folders that a run or a recipe reads, remembered between starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from madpo.trainer.files import hash_of_file, sampled_content, write_atomically


class Contents:
    """Hashes the contents of files and folders, and remembers them between runs.

    A file is read again only if its size, its time of change, or a sample of it differs. The samples are all
    of a small file.
    """

    def __init__(self, store: Path) -> None:
        self.store = store  # a JSON file
        self.stored = _stored(store)
        self.used: dict[str, str] = {}

    def __call__(self, path: Path, without: Path) -> str:
        """The hash of a file; or of all files in the folder `path`, with names, except those in `without`."""
        if path.is_file():
            return self.of_file(path)
        files = sorted(x for x in path.rglob("*") if not x.is_relative_to(without) and x.is_file())
        parts = [(file.relative_to(path).as_posix(), self.of_file(file)) for file in files]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    def of_file(self, path: Path) -> str:
        """The hash of a file's bytes."""
        facts = path.stat()
        key = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns} {sampled_content([path])}"
        if key not in self.stored:
            self.stored[key] = hash_of_file(path)
        self.used[key] = self.stored[key]
        return self.used[key]

    def save(self) -> None:
        """Store the hashes that were used this time; others are forgotten."""
        self.store.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.store, self.used)


def _stored(store: Path) -> dict[str, str]:
    """What was stored; nothing if that cannot be read, as then all is hashed again."""
    try:
        stored = json.loads(store.read_bytes())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content) + "\n")
