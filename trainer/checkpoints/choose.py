"""Which checkpoint a run continues from: the newest whole one, after every byte of it was looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from madpo.trainer.checkpoints import folders
from madpo.trainer.checkpoints.identity import LENGTH, difference
from madpo.trainer.checkpoints.manifest import DamagedError, Manifest, fault_in, read
from madpo.trainer.dist import Shard, from_main, gathered, raise_if_any
from madpo.trainer.errors import FRESH, CheckpointError


class Chosen(NamedTuple):
    """A checkpoint that was verified."""

    folder: Path
    manifest: Manifest


def choose(
    root: Path, identity: dict[str, Any], shard: Shard, *, may_set_aside: bool = False
) -> Chosen | None:
    """The newest whole checkpoint below `root`, equal on all ranks; None if there has never been one.

    Damaged ones that are newer are named, and with `may_set_aside` renamed. Raises CheckpointError if there
    are checkpoints and none is whole, or if a rank sees other ones; UserError if the run that wrote it had
    another value of one of the keys in `identity`.
    """
    raise_if_any(_no_folder(root) if shard.is_main else None)
    candidates = from_main([path.name for path in folders.checkpoints_in(root)])
    own = [path.name for path in folders.checkpoints_in(root)]
    is_shared = own == candidates
    raise_if_any(None if is_shared else _not_shared(root, candidates, own))
    rejected: list[tuple[Path, str]] = []
    for name in candidates:
        found = _manifest_of(root / name, shard)
        if isinstance(found, Manifest):
            # Looked at first, as it is free; the files of a large model take a while.
            changed = difference(found.identity, identity)
            raise_if_any(None if changed is None else _of_another_run(root / name, changed))
            found = _fault_in(root / name, found, shard) or found
        if isinstance(found, Manifest):
            if shard.is_main:
                _report(rejected, may_set_aside)
            return Chosen(root / name, found)
        rejected.append((root / name, found))
    aside = from_main([str(path.name) for path in folders.damaged_in(root)])
    if not rejected and not aside:
        return None
    reasons = "".join(f"\n  {path.name}: {reason}" for path, reason in rejected)
    reasons += "".join(f"\n  {name}: set aside before" for name in aside)
    raise CheckpointError(
        f"{root}: no sound checkpoint to continue from:{reasons}\n"
        f"put a sound copy there; or train with {FRESH}"
    )


def _manifest_of(checkpoint: Path, shard: Shard) -> Manifest | str:
    """The manifest of a checkpoint, or what is wrong with it. Equal on all ranks."""
    found: Manifest | str = ""
    if shard.is_main:
        try:
            found = read(checkpoint)
        except DamagedError as error:
            found = str(error)
    return from_main(found)


def _fault_in(checkpoint: Path, manifest: Manifest, shard: Shard) -> str | None:
    """What is wrong with the files of a checkpoint, each looked at by one rank. Equal on all ranks."""
    own = sorted(manifest.files)[shard.rank :: shard.world_size]
    faults = gathered(fault_in(checkpoint, manifest.files, own))
    return next((fault for fault in faults if fault is not None), None)


def _report(rejected: list[tuple[Path, str]], may_set_aside: bool) -> None:
    for path, reason in rejected:
        place = f"; set aside as {folders.set_aside(path).name}" if may_set_aside else ""
        print(f"checkpoint {path} is not used: {reason}{place}", flush=True)


def _no_folder(root: Path) -> CheckpointError | None:
    """What is in the place of the folder, into which no checkpoint could be written either."""
    if root.is_dir() or not (root.exists() or root.is_symlink()):
        return None
    what = f"a link to {root.readlink()}, which is not there" if root.is_symlink() else "a file"
    return CheckpointError(f"{root} is {what}; bring the folder back, or train with {FRESH}")


def _not_shared(root: Path, candidates: list[str], own: list[str]) -> CheckpointError:
    there, here = (", ".join(names) or "none" for names in (candidates, own))
    return CheckpointError(
        f"{root}: rank 0 sees checkpoints {there}, this rank sees {here}; output_dir must be shared storage"
    )


def _of_another_run(checkpoint: Path, changed: str) -> str:
    keys = [line.split(":")[0].strip() for line in changed.splitlines() if line]
    if set(keys) <= set(LENGTH):
        other = "give the length that is there, in the config too; or add --extend for that of now"
    else:
        other = (
            "set them back to continue; or train on from these weights in another output_dir, with "
            "model.model_name_or_path naming this run"
        )
    return f"{checkpoint} was made with other settings:{changed}\n{other}; or begin anew with {FRESH}"
