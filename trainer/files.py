"""Write files and folders so that they appear complete or not at all; hash files.

The content is written under a temporary name in the same folder, flushed to the disk and renamed; then the
rename is flushed too. So what has its name is complete, even after a crash of the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import xxhash

BLOCK = 1 << 22


def write_atomically(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file, replacing an older one. If that fails, nothing has changed.

    `content` is text (written as UTF-8), bytes, or a function that writes to the path it is given. The
    folder must exist.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        if isinstance(content, str):
            partial.write_bytes(content.encode())
        elif isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            content(partial)
        _flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_folder_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Make a folder, replacing an older one; `write` creates it at the temporary path it is given.

    What a killed process left under the temporary name is removed first.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        for file in partial.rglob("*"):
            _flush_folder(file) if file.is_dir() else _flush(file)
        _flush_folder(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush_folder(path.parent)


def hash_of_file(*paths: Path) -> str:
    """A hash of a file's bytes, or of several files' bytes one after the other."""
    content = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                content.update(block)
    return content.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Flush the names in a folder, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
