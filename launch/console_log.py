"""`log.txt` in the run folder: what rank 0 prints, and the errors of all ranks; a console that goes away."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rich.ansi import AnsiDecoder

from madpo.launch.help import versions
from madpo.trainer.errors import UserError

NAME = "log.txt"


def outlive_readers(tell: Callable[[str], None] = lambda _: None) -> None:
    """From now on, that nobody reads what this process prints is no error: the text goes nowhere.

    A terminal may be closed meanwhile, and `| head -1` ends after a line. `tell` is called with a line that
    says so.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed from the start
            stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        setattr(sys, name, Lasting(stream, name, tell))


class Lasting:
    """A text stream that goes on without its reader."""

    def __init__(self, stream: TextIO, name: str, tell: Callable[[str], None]) -> None:
        self._stream, self._name, self._tell = stream, name, tell

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._leave(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._leave(error)

    def _leave(self, error: OSError) -> None:
        """Turn the stream to nowhere, for libraries that write to its descriptor too."""
        with suppress(OSError):  # a stream without one
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._tell(f"{self._name} takes no more text ({error.strerror}); {NAME} has what follows")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep(folder: Path, command: str) -> None:
    """From now on, keep in the folder's log what this process prints; a header says who prints it.

    Raises UserError if nothing can be written there.
    """
    try:
        append(folder, f"== {time.strftime('%Y-%m-%d %H:%M:%S')}  {command}  ({', '.join(versions())})")
        file = (folder / NAME).open("ab", buffering=0)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be written to: {error.strerror}") from None
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not _is_same(stream, file):  # `madpo run --jobs` lets a stage print into this file
            kept = Kept(stream, file)
            setattr(sys, name, kept)
            _let_loggers_print_to(kept, stream)


def append(folder: Path, text: str) -> None:
    """Add lines to a folder's log, in one write, as several ranks may do so at a time, also before rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / NAME).open("ab", buffering=0) as file:
        file.write(f"{text}\n".encode())


class Kept:
    """A text stream whose finished lines are also written to a file, as a terminal shows them in the end."""

    def __init__(self, stream: TextIO, file: io.RawIOBase) -> None:
        self._stream, self._file = stream, file
        self._decoder = AnsiDecoder()
        self._line = ""
        self._is_full = False

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            # Of a line that was overwritten, as progress bars do, the last state stays.
            self._keep(self._decoder.decode_line(line.rstrip(chr(13))).plain)
        return self._stream.write(text)

    def _keep(self, line: str) -> None:
        """Write a line into the file; that this cannot be done is said once, and no reason to end a run."""
        try:
            self._file.write(f"{line}\n".encode())
        except OSError as error:
            if not self._is_full:
                self._is_full = True
                self._stream.write(f"{NAME} cannot be written to ({error.strerror}); it lacks lines\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _let_loggers_print_to(kept: Kept, stream: TextIO) -> None:
    """Turn the handlers that libraries made for the stream to the one that is kept."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in (each for logger in loggers for each in getattr(logger, "handlers", [])):
        # One that looks `sys.stderr` up each time has no stream of its own, and needs no turning.
        if isinstance(handler, logging.StreamHandler) and vars(handler).get("stream") is stream:
            handler.setStream(kept)


def _is_same(stream: TextIO, file: io.RawIOBase) -> bool:
    try:
        return os.path.sameopenfile(stream.fileno(), file.fileno())
    except OSError:  # a stream that is no file
        return False
