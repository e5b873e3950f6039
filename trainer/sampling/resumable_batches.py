"""Work on prompts in batches, shared out over the ranks; every finished batch is a file.

A batch's result depends on the batch alone: so the number of ranks changes nothing, and work that was cut
off goes on where it stood.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from madpo.trainer import dist
from madpo.trainer.dist import Shard
from madpo.trainer.files import write_atomically
from madpo.trainer.reports.progress import SECONDS_BETWEEN_PROGRESS_LINES, print_line


@dataclass(frozen=True)
class Batch:
    """Prompts that are sampled for and judged at once."""

    split: str
    number: int
    members: list[int]  # places among the split's prompts


def batches_of(split: str, lengths: Sequence[int], size: int) -> list[Batch]:
    """Prompts of like length together, for little padding; the longest first, so that memory runs out at
    once or never."""
    order = np.argsort(-np.array(lengths), kind="stable")
    return [
        Batch(split, number, order[start : start + size].tolist())
        for number, start in enumerate(range(0, len(order), size))
    ]


BatchJob = tuple[Callable[[Batch], Any], Callable[[], None]]
"""What to do with a batch, and what to do after the last one."""


class ResumableBatches:
    """Finished batches on disk, under a key of everything that they depend on."""

    def __init__(self, root: Path, identity: Any) -> None:
        self.key = xxhash.xxh3_128_hexdigest(json.dumps(identity, sort_keys=True, default=str).encode())
        self.folder = root / self.key

    def path(self, batch: Batch) -> Path:
        return self.folder / f"{batch.split}-{batch.number:06d}.json"

    def read(self, batch: Batch) -> Any:
        return json.loads(self.path(batch).read_text(encoding="utf-8"))

    def write(self, batch: Batch, value: Any) -> None:
        write_atomically(self.path(batch), json.dumps(value, ensure_ascii=False))

    def fill(
        self,
        batches: Sequence[Batch],
        shard: Shard,
        what: str,
        open_work: Callable[[], BatchJob],
        in_step: bool = False,
    ) -> None:
        """Do the missing batches, each on one rank. `open_work` is called only if something is missing.
        Ranks that go `in_step` make equally many calls."""
        todo: list[Batch] = dist.from_main([b for b in batches if not self.path(b).exists()])
        if shard.is_main:
            kept = len(batches) - len(todo)
            print_line(f"{what}: {len(todo)} batches" + (f", {kept} are there already" if kept else ""))
        if todo:
            self.folder.mkdir(parents=True, exist_ok=True)
            work, close = open_work()
            mine = todo[shard.rank :: shard.world_size]
            dummies = -(-len(todo) // shard.world_size) - len(mine) if in_step else 0
            for batch in _with_progress_lines(mine, what, shard):
                self.write(batch, work(batch))
            for _ in range(dummies):
                work(todo[-1])
            close()
        dist.barrier()


def _with_progress_lines(batches: Sequence[Batch], what: str, shard: Shard) -> Iterator[Batch]:
    """The batches; rank 0 says now and then how far it has come."""
    last = time.monotonic()
    for done, batch in enumerate(batches):
        yield batch
        if shard.is_main and time.monotonic() - last > SECONDS_BETWEEN_PROGRESS_LINES:
            last = time.monotonic()
            print_line(f"{what}: {done + 1} of this rank's {len(batches)} batches")
