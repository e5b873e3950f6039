"""Work on prompts in batches, spread over the ranks; every finished batch is a file.

A batch's result depends on the batch alone. So the number of ranks changes nothing, and work that was
interrupted continues with the missing batches.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from madpo.trainer import dist
from madpo.trainer.counted import counted
from madpo.trainer.dist import Shard
from madpo.trainer.files import write_atomically
from madpo.trainer.reports.progress import SECONDS_BETWEEN_LINES, print_line


@dataclass(frozen=True)
class Batch:
    """Prompts whose completions are sampled, or judged, together."""

    split: str
    number: int
    members: list[int]  # positions among the split's prompts


def batches_of(split: str, lengths: Sequence[int], size: int) -> list[Batch]:
    """Cut prompts into batches of similar length, for little padding. The longest come first, so that memory
    runs out at once or never."""
    order = np.argsort(-np.array(lengths), kind="stable")
    return [
        Batch(split, number, order[start : start + size].tolist())
        for number, start in enumerate(range(0, len(order), size))
    ]


BatchJob = tuple[Callable[[Batch], Any], Callable[[], None]]
"""(batch -> its result, what to call after the last batch)."""


class ResumableBatches:
    """Results of batches on disk, in a folder named by a hash of everything that they depend on."""

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
        name: str,
        open_job: Callable[[], BatchJob],
        in_step: bool = False,
    ) -> None:
        """Compute the missing batches, each on one rank; progress lines call it `name`.

        `open_job` is called only if a batch is missing. With `in_step` all ranks make the same number of
        calls, as ZeRO-3's collectives need; a rank without a batch of its own repeats another.
        """
        missing: list[Batch] = dist.from_main([b for b in batches if not self.path(b).exists()])
        if shard.is_main:
            finished = len(batches) - len(missing)
            line = f"{name}: {counted(len(missing), 'batch', 'batches')}"
            print_line(f"{line}, {finished} more there already" if finished else line)
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            compute, close = open_job()
            own = missing[shard.rank :: shard.world_size]
            for batch in _with_progress_lines(own, name, shard):
                self.write(batch, compute(batch))
            if in_step:
                most = math.ceil(len(missing) / shard.world_size)
                for _ in range(most - len(own)):
                    compute(missing[-1])
            close()
        dist.barrier()


def _with_progress_lines(batches: Sequence[Batch], name: str, shard: Shard) -> Iterator[Batch]:
    """Yield the batches. Rank 0 prints now and then how many are done."""
    last = time.monotonic()
    for done, batch in enumerate(batches):
        yield batch
        if shard.is_main and time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print_line(f"{name}: {done + 1} of this rank's {len(batches)} batches")
