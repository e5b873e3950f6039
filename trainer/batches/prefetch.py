"""Steps that are read and packed while the one before them is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from madpo.trainer.batches.steps import Step

AHEAD = 2
"""Steps that are ready or being made while one is computed."""


def prefetched(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """The same steps, made by one thread in the background, in pinned memory if they go to a GPU.

    What making a step raises is raised where its turn comes. Meant for the head of a for loop: the thread
    ends with the loop, however that ends.
    """

    def make() -> Step | None:
        step = next(steps, None)
        return step.pin_memory() if step is not None and device.type == "cuda" else step

    background = ThreadPoolExecutor(1, "prefetch", initializer=_use, initargs=(device,))
    try:
        ready = deque(background.submit(make) for _ in range(AHEAD))
        while (step := ready.popleft().result()) is not None:
            ready.append(background.submit(make))
            yield step
    finally:
        background.shutdown(wait=True, cancel_futures=True)


def _use(device: torch.device) -> None:
    """A thread begins on the first GPU, where pinning memory would open a context of its own."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
