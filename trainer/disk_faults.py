"""One line when a disk or its folders do not take or give a run's files: which file, why, and what to do.

Libraries raise such errors in many forms, with and without the file's name.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from madpo.trainer.config.schema import Config
from madpo.trainer.errors import UserError, system_error

REMEDIES = {
    errno.ENOSPC: "make room there, or use another folder",
    errno.EDQUOT: "make room within the quota, or use another folder",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "use another folder",
}
"""Errors of writing -> what to do."""
OF_OUR_FILES = {
    errno.EISDIR: "a folder is in the place of this file; move it away",
    errno.EEXIST: "a file is in the place of this folder; move it away",
    errno.ENOTDIR: "a file is in the place of a folder; move it away",
    errno.EACCES: "let this user read and write there, or use another folder",
    errno.EPERM: "let this user read and write there, or use another folder",
    errno.ELOOP: "remove the links that run in circles",
    errno.EIO: "look after the disk (dmesg), or use another folder",
    errno.ESTALE: "mount the storage anew, and start the run again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
"""Errors of reading or writing a file of the run or the cache -> what to do."""
IN_WORDS = re.compile(r"\(?os error (\d+)\)?|\[errno (\d+)\]", re.IGNORECASE)
"""How libraries that are no Python write the number of an error."""
DIED = "abruptly died during map operation"


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Raise UserError in place of an error of the disk, or of a tokenising process that was killed."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (text := _explain(error, config)) is None:
            raise
        raise UserError(text) from error


def _explain(error: Exception, config: Config) -> str | None:
    """What to say of an error; None for one of another kind."""
    run, cache = Path(config.output_dir), Path(config.data.cache_dir).expanduser()
    if DIED in str(error):
        return (
            f"data.dataset_num_proc: one of the {config.data.dataset_num_proc} processes that tokenise was "
            "killed, often by the kernel, out of memory (see dmesg); set fewer, and give the command again"
        )
    cause = system_error(error)
    named = getattr(cause, "filename2", None) or getattr(cause, "filename", None)  # that of a rename's target
    is_ours = named is not None and any(Path(str(named)).is_relative_to(folder) for folder in (run, cache))
    if is_ours and cause is not None and cause.errno in OF_OUR_FILES:
        return f"{named}: {os.strerror(cause.errno)}: {OF_OUR_FILES[cause.errno]}"
    if isinstance(error, FileNotFoundError) and is_ours and not run.exists():
        return f"output_dir: {run} was removed while the run was writing into it; start it again"
    if (number := number_of(error)) is None:
        return None
    if named is None:
        folders = {"output_dir": run, "data.cache_dir": cache}
        named = " or ".join(f"{key} {_with_room(folder, number)}" for key, folder in folders.items())
    return f"{named}: cannot be written to ({os.strerror(number)}); {REMEDIES[number]}"


def number_of(error: BaseException) -> int | None:
    """The number of an error that a disk gives to those who write; None for another error."""
    cause = system_error(error)
    number = None if cause is None else cause.errno
    if number is None and (found := IN_WORDS.search(str(error))):
        number = int(found[1] or found[2])
    return number if number in REMEDIES else None


def _with_room(folder: Path, number: int) -> str:
    """The folder and how much may be written there, as text."""
    if number == errno.EFBIG:
        return f"{folder} (files of {resource.getrlimit(resource.RLIMIT_FSIZE)[0]:,} bytes at most)"
    if not folder.exists():
        return str(folder)
    return f"{folder} ({shutil.disk_usage(folder).free / 1e9:,.3f} GB free)"
