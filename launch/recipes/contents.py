"""Hashes of the files and folders that a recipe's stages read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from madpo.trainer.files import hash_of_file, write_atomically


class Contents:
    """Hashes of what files and folders hold. A file of the same size and time is not read twice."""

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        self.known: dict[str, str] = json.loads(memory.read_text()) if memory.is_file() else {}
        self.seen: dict[str, str] = {}

    def __call__(self, path: Path, without: Path) -> str:
        """The hash of a file, or of all files below a folder by relative name but those below another."""
        if path.is_file():
            return self._of_file(path)
        files = sorted(x for x in path.rglob("*") if not x.is_relative_to(without) and x.is_file())
        parts = [(file.relative_to(path).as_posix(), self._of_file(file)) for file in files]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())

    def _of_file(self, path: Path) -> str:
        facts = path.stat()
        key = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"
        if key not in self.known:
            self.known[key] = hash_of_file(path)
        self.seen[key] = self.known[key]
        return self.seen[key]

    def save(self) -> None:
        """Remember what was asked for this time."""
        write_json(self.memory, self.seen)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, json.dumps(content) + "\n")
