"""Saving: every rank writes its shards, all agree that they are on the disk, one rename commits them.

A folder is called `step-N.partial` until then. With `train.async_save` the step goes on while a thread
writes, and what is agreed once a step (`trainer/agreement.py`) commits the checkpoint some steps later. A
run that dies in between leaves the checkpoint before, and a folder that nobody takes for one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

import torch

from madpo.trainer.agreement import Agreement, Told
from madpo.trainer.checkpoints.folders import FOREIGN, PARTIAL, name_of, remove_old, set_aside, step_of
from madpo.trainer.checkpoints.manifest import Manifest
from madpo.trainer.dist import Shard, barrier, from_main, gathered
from madpo.trainer.engine import Engine
from madpo.trainer.errors import CheckpointError
from madpo.trainer.files import Entry, flush_folder, hash_of_file
from madpo.trainer.zero3.shard_files import ShardFiles


class Writing(IntEnum):
    """How far one rank is with the checkpoint under way; the largest of all ranks counts."""

    DONE = 0
    BUSY = 1
    FAILED = 2


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay."""

    last: int  # so many of the newest
    every: int | None = None  # and those of every so many steps


class Saver:
    """Writes the checkpoints of a run. All ranks call it at the same places."""

    def __init__(
        self,
        engine: Engine,
        root: Path,
        shard: Shard,
        keep: Keep,
        agreement: Agreement,
        manifest: Callable[[], Manifest],
        *,
        in_background: bool,
        with_reference: bool,
        check_owner: Callable[[], str | None],
        say: Callable[[str], None],
        last_step: int | None = None,
    ) -> None:
        """`root` is the folder `checkpoints`. A reference that moves belongs into them (`with_reference`).

        `manifest` makes the manifest of a checkpoint of the run as it is, without its files. `check_owner`
        says, on rank 0, why this process may not commit, if a later start has taken the folder over. `say`
        gets a line about a checkpoint that could not be written, and about what was in its way.
        """
        self._engine, self._root, self._shard, self._keep = engine, root, shard, keep
        self._with_reference, self._in_background = with_reference, in_background
        self._manifest, self._check_owner, self._say = manifest, check_owner, say
        self._files = ShardFiles(in_background)
        self._agreement = agreement
        self._pending: Manifest | None = None  # the checkpoint under way
        self._committing: Future[None] | None = None  # its commit, once all shards are written
        self._thread = ThreadPoolExecutor(1, "commit") if shard.is_main else None
        self.last_step = last_step  # of the newest checkpoint; None if there is none
        engine.write_with(self._files)

    def agree(self, stop: int, save: bool, odd: bool = False) -> Told:
        """Tell the other ranks and hear from them, once a step; commits what all have written."""
        agreed = self._agreement.on(Told(stop, self._told(), save, odd))
        self._advance(agreed.writing)
        return agreed

    def save(self) -> None:
        """Begin a checkpoint. In the background, return when all is copied.

        One that is under way is finished first. Whether this one was written shows in `last_step`.
        """
        self.finish()
        manifest = self._manifest()
        step, partial = manifest.state.step, self._partial(manifest)
        if (problem := self._prepared(partial)) is not None:
            self._say(f"no checkpoint of step {step}: {problem}")
            return
        self._files.begin()
        self._engine.save(self._root, partial.name, with_frozen=self._with_reference)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the copies, before the next update
        self._pending = manifest
        if not self._in_background:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint under way, if there is one."""
        while self._pending is not None:
            self._files.wait()
            if self._committing is not None:
                self._committing.exception()  # waits
            self._advance(self._agreement.on(Told(writing=self._told())).writing)

    def close(self) -> None:
        """End the threads. A checkpoint that is under way stays unfinished."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
        self._agreement.close()

    def _told(self) -> Writing:
        """What this rank tells the others."""
        if self._files.error is not None:
            return Writing.FAILED
        if self._committing is not None:
            if not self._committing.done():
                return Writing.BUSY
            return Writing.DONE if self._committing.exception() is None else Writing.FAILED
        return Writing.BUSY if self._files.is_writing else Writing.DONE

    def _advance(self, agreed: int) -> None:
        """Go on with the checkpoint under way, as far as all ranks are (`agreed`)."""
        if self._pending is None or agreed == Writing.BUSY:
            return
        if agreed == Writing.FAILED:
            self._give_up(self._pending)
        elif self._committing is None:
            self._committing = self._commit(self._pending)
        else:
            self.last_step = self._pending.state.step
            self._pending, self._committing = None, None

    def _partial(self, manifest: Manifest) -> Path:
        return self._root / (name_of(manifest.state.step) + PARTIAL)

    def _prepared(self, partial: Path) -> str | None:
        """Make an empty folder; why that cannot be, equal on all ranks, else None."""
        problem = None
        if self._shard.is_main:
            try:
                self._root.mkdir(exist_ok=True)
                if partial.is_symlink() or (partial.exists() and not partial.is_dir()):  # no save has left it
                    self._say(f"{partial} is no folder; set aside as {set_aside(partial, FOREIGN).name}")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                problem = self._too_little_disk()
            except OSError as error:
                problem = f"{partial} cannot be made ({error.strerror})"
        return from_main(problem)

    def _too_little_disk(self) -> str | None:
        need, free = self._engine.state_bytes(self._with_reference), shutil.disk_usage(self._root).free
        if free >= need:
            return None
        return (
            f"{self._root} has {free / 1e9:,.1f} GB free and a checkpoint needs {need / 1e9:,.1f} GB; make "
            "room, lower train.save_total_limit, or use another output_dir"
        )

    def _commit(self, manifest: Manifest) -> Future[None]:
        """Gather what all ranks have written; rank 0 commits it, in a thread, and no other rank waits."""
        own = self._files.entries | self._swapped_out(self._partial(manifest))
        parts = gathered(own, self._agreement.group)
        if self._thread is not None:
            files = {name: entry for part in parts for name, entry in part.items()}
            return self._thread.submit(self._commit_now, replace(manifest, files=files))
        nothing_to_do: Future[None] = Future()
        nothing_to_do.set_result(None)
        return nothing_to_do

    def _commit_now(self, manifest: Manifest) -> None:
        partial, target = self._partial(manifest), self._root / name_of(manifest.state.step)
        if (problem := self._check_owner()) is not None:
            raise CheckpointError(problem)
        manifest.write(partial)
        if target.exists():  # of a run that was cut off behind it
            set_aside(target)
        os.replace(partial, target)
        flush_folder(self._root)
        remove_old(self._root, step_of(target.name), self._keep.last, self._keep.every)

    def _swapped_out(self, partial: Path) -> dict[str, Entry]:
        """The entries of what this rank's optimiser had on the node's disk (NVMe), which DeepSpeed copies."""
        folder = partial / "offloaded_tensors" / f"rank{self._shard.rank}"
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(partial)): Entry(path.stat().st_size, hash_of_file(path)) for path in files
        }

    def _give_up(self, manifest: Manifest) -> None:
        """Say why there is no such checkpoint; the one before stays the newest."""
        self._files.wait()
        error = self._files.error
        if error is None and self._committing is not None:
            error = str(self._committing.exception() or "") or None
        errors = gathered(error, self._agreement.group)
        self._pending, self._committing = None, None
        self._files.begin()
        if self._shard.is_main:
            shutil.rmtree(self._partial(manifest), ignore_errors=True)
        rank, text = next((rank, text) for rank, text in enumerate(errors) if text)
        self._say(f"no checkpoint of step {manifest.state.step}: rank {rank}: {text}")
        barrier()
