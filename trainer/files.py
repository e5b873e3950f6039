"""Write files and folders so that they appear complete or not at all; hash files.

The content is written under a temporary name in the same folder, flushed to the disk and renamed; then the
rename is flushed too. So what has its name is complete, even after a crash of the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from madpo.trainer.errors import UserError

BLOCK = 1 << 22
SECONDS_UNTIL_LEFT = 3600.0
"""A temporary file that nobody has written to for so long is a killed process's."""

LONGEST_SHOWN = 100
"""The characters of a path that a message shows."""

SAMPLES, SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class Entry:
    """What a file must be like: its size in bytes, and its hash as `hash_of_file` gives it."""

    size: int
    checksum: str


def check_path(path: str | os.PathLike[str], key: str = "") -> None:
    """Raise UserError, which begins with `key`, for a path that can lead to no file or folder."""
    fault = fault_of_path(path)
    if fault is not None:
        raise UserError(f"{_named(path, key)}: {fault}")


def fault_of_path(path: str | os.PathLike[str]) -> str | None:
    """Why a path can lead to no file or folder: it is too long, holds a NUL character, runs in circles, leads
    where nobody may look, or to a pipe, a socket or a device. None for others, also if nothing is there."""
    if os.fspath(path).startswith("~") and os.path.expanduser(path) == os.fspath(path):
        return "no user of that name has a home folder here"
    try:
        mode = os.stat(os.path.expanduser(path)).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return f"cannot be looked at ({getattr(error, 'strerror', None) or error})"
    is_usual = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    return None if is_usual else "a pipe, a socket or a device; name a file or a folder"


def _named(path: str | os.PathLike[str], key: str) -> str:
    text = os.fspath(path)
    shown = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} characters)"
    return f"{key}: {shown}" if key else shown


def write_named(path: Path, text: str) -> None:
    """Write a file that the user has named, and make its folder. Raises UserError if that is not possible."""
    check_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another file") from None


def make_folder(key: str, folder: Path) -> Path:
    """The folder, which is made if it is not there. Raises UserError that names `key`, a key of the config,
    if it cannot be made or written to."""
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{_named(folder, key)} cannot be written to ({reason}); name another folder"
        ) from None


def write_atomically(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Write a file, replacing an older one. If that fails, nothing has changed.

    `content` is text (written as UTF-8), bytes, or a function that writes to the path it is given. The
    folder must exist. What a killed process left under a temporary name is removed.
    """
    for leftover in path.parent.glob(f"{path.name}.partial-*"):
        if time.time() - leftover.stat().st_mtime > SECONDS_UNTIL_LEFT:
            leftover.unlink(missing_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        if isinstance(content, str):
            partial.write_bytes(content.encode())
        elif isinstance(content, bytes):
            partial.write_bytes(content)
        else:
            content(partial)
        flush(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object that people may read, too."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no such file. Raises UserError for another content."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: {error}; mend or remove it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; mend or remove it")
    return content


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read."""
    path.unlink(missing_ok=True)
    with open(path, "x", encoding="utf-8", opener=partial(os.open, mode=0o600)) as file:
        file.write(text)


def write_folder_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Make a folder, replacing an older one; `write` creates it at the temporary path it is given.

    If writing fails, nothing has changed. If the folders cannot change places (an old file that is still
    open on a network disk, say), the old one stays and the new one is left beside it, with `.partial` behind
    its name. What a killed process left under that name is removed first.
    """
    partial, aside = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        write(partial)
        for file in partial.rglob("*"):
            if file.is_dir():
                flush_folder(file)
            elif not file.is_symlink():
                flush(file)
        flush_folder(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    replaces = path.exists()
    if replaces:
        os.replace(path, aside)
    try:
        os.replace(partial, path)
    except BaseException:
        if replaces:
            os.replace(aside, path)
        raise
    flush_folder(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sampled_content(files: Iterable[Path]) -> str:
    """A hash of each file's size and of SAMPLES samples spread evenly over it, from end to end. Up to
    SAMPLES x SAMPLE_BYTES that is the whole file."""
    content = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        content.update(f"{size} ".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(size - SAMPLE_BYTES, 0) * sample // (SAMPLES - 1))
                content.update(file.read(SAMPLE_BYTES))
    return content.hexdigest()


def hash_of_file(*paths: Path) -> str:
    """A hash of a file's bytes, or of several files' bytes one after the other."""
    content = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                content.update(block)
    return content.hexdigest()


SEAL = "seal.json"


def facts_of(path: Path) -> list[int]:
    """What tells that a file was written to: its size, and when its content and its entry last changed, in
    nanoseconds. A tool that sets the first time back cannot do so with the second."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]


def seal(folder: Path) -> None:
    """Write into a folder the hash and the facts of every file of it."""
    sealed = {_name_in(folder, file): [hash_of_file(file), facts_of(file)] for file in _files_in(folder)}
    (folder / SEAL).write_text(json.dumps(sealed) + "\n")


def is_untouched(folder: Path) -> bool:
    """Whether nobody has written to a sealed folder since, by the facts of its files, which are not read."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        sealed = json.loads((folder / SEAL).read_text())
        facts = {_name_in(folder, file): facts_of(file) for file in _files_in(folder)}
        return facts == {name: of_file for name, (_, of_file) in sealed.items()}
    return False


def fault_in(folder: Path) -> str | None:
    """What differs in a folder from the time it was sealed, as text for the user; None if nothing does."""
    try:
        sealed = json.loads((folder / SEAL).read_text())
        sums = {name: checksum for name, (checksum, _) in sealed.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{SEAL} cannot be read ({type(error).__name__})"
    for name in sorted(sums.keys() | {_name_in(folder, file) for file in _files_in(folder)}):
        if name not in sums:
            return f"{name} was added"
        if not (folder / name).is_file():
            return f"{name} is missing"
        if hash_of_file(folder / name) != sums[name]:
            return f"{name} has changed"
    return None


def discard_damaged(folder: Path, then: str, verify: bool = False) -> None:
    """Delete a sealed folder in which something differs, and say so; `then` is what comes of it.

    Its files are read if one of them was touched since, as by a copy, or to `verify` them.
    """
    if not folder.is_dir() or (is_untouched(folder) and not verify):
        return
    if fault := fault_in(folder):
        print(f"damaged cache {folder}: {fault}; {then}", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    else:
        seal(folder)


def _files_in(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in files if file.name != SEAL and file.suffix != ".lock")


def _name_in(folder: Path, file: Path) -> str:
    return str(file.relative_to(folder))


def flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Flush the names in a folder; a file system that cannot do that keeps them in its own way."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
