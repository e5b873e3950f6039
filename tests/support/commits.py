"""What a test sees of files that are written, synced, renamed and removed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Commits:
    """Calls of the system in their order, as ("replace", name) and the like. A file that gets its name by a
    rename is whole by then, and on disk: `unsynced` names those that are not."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    unsynced: list[str] = field(default_factory=list)
    _synced: set[tuple[int, int]] = field(default_factory=set)  # (inode, bytes)

    def watch(self, patch: pytest.MonkeyPatch) -> Commits:
        sync, replace, remove = os.fsync, os.replace, shutil.rmtree

        def fsync(file: Any) -> None:
            state = os.fstat(file if isinstance(file, int) else file.fileno())
            self._synced.add((state.st_ino, state.st_size))
            sync(file)

        def renamed(source: Any, target: Any, **options: Any) -> None:
            state = os.stat(source)
            if (state.st_ino, state.st_size) not in self._synced:
                self.unsynced.append(Path(target).name)
            replace(source, target, **options)
            self.calls.append(("replace", Path(target).name))

        def removed(path: Any, *args: Any, **options: Any) -> None:
            remove(path, *args, **options)
            self.calls.append(("remove", Path(path).name))

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", renamed)
        patch.setattr(shutil, "rmtree", removed)
        return self


def no_rename(source: Any, target: Any, **options: Any) -> None:
    """In place of os.replace: the disk fails at the moment of the commit."""
    raise OSError(f"no space left on device: {target}")
