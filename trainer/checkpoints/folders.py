"""The folders below `checkpoints/`: which are checkpoints, which is newest, which may be deleted.

step-00000100            a checkpoint: it has its name only when all of it is on the disk
step-00000100.partial    one that is being written, or that a killed run left
step-00000100.damaged    one that was found damaged, set aside; nothing reads or deletes it
step-00000100.partial.not-ours  what was in the place of the second and no folder, set aside as well
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from madpo.trainer.files import flush_folder

NAME = re.compile(r"step-(\d{8,})")
PARTIAL, DAMAGED, FOREIGN = ".partial", ".damaged", ".not-ours"
MANIFEST = "manifest.json"


def name_of(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def step_of(checkpoint: str) -> int:
    """The step of the checkpoint of that name, as in step-00000100."""
    match = NAME.fullmatch(checkpoint)
    assert match, checkpoint
    return int(match[1])


def checkpoints_in(root: Path) -> list[Path]:
    """The folders that are called as checkpoints are, newest first; what is in them is not looked at.

    Links count, wherever they lead: a checkpoint may have been moved to another disk, which may be away.
    """
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if NAME.fullmatch(path.name)]
    found = [path for path in found if path.is_dir() or path.is_symlink()]
    return sorted(found, key=lambda path: step_of(path.name), reverse=True)


def newest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that was committed, unverified; None if there is none."""
    return next((path for path in checkpoints_in(root) if (path / MANIFEST).is_file()), None)


def damaged_in(root: Path) -> list[Path]:
    """The checkpoints that were set aside."""
    return sorted(root.glob(f"step-*{DAMAGED}*"))


def set_aside(checkpoint: Path, mark: str = DAMAGED) -> Path:
    """Rename a damaged checkpoint, or what else is in the way; the new path, which nothing had before."""
    number, target = 1, checkpoint.with_name(checkpoint.name + mark)
    while target.exists():
        number += 1
        target = checkpoint.with_name(f"{checkpoint.name}{mark}-{number}")
    checkpoint.rename(target)
    flush_folder(checkpoint.parent)
    return target


def remove_partial(root: Path) -> list[str]:
    """Delete what killed runs left half-written; the names of those folders."""
    names = []
    for path in sorted(root.glob(f"step-*{PARTIAL}")):
        if NAME.fullmatch(path.name.removesuffix(PARTIAL)) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            names.append(path.name)
    return names


def remove_old(root: Path, newest: int, keep: int, keep_every: int | None) -> None:
    """Delete the checkpoints up to step `newest`, but the last `keep` and those of every `keep_every` steps.

    Only whole folders of ours are counted and deleted: later ones are of a run that was cut off; one without
    a manifest, or a link, is somebody else's. One that a kill leaves half deleted is called as half-written
    ones.
    """
    ours = [path for path in checkpoints_in(root) if (path / MANIFEST).is_file() and not path.is_symlink()]
    ours = [path for path in ours if step_of(path.name) <= newest]
    for path in ours[keep:]:
        if keep_every is None or step_of(path.name) % keep_every:
            shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))
