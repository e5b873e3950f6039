"""Prefetching: the next steps are read and packed while this one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from madpo.trainer.batches.steps import Step

AHEAD = 2
"""Steps that are ready or in the making while one is computed."""


def prefetched(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """`steps`, made by one background thread, in pinned memory if they go to a GPU.

    An error in making a step is raised when its turn comes. Meant for the head of a for loop: the thread
    ends with the loop, however that ends.
    """

    def make() -> Step | None:
        step = next(steps, None)
        return step.pin_memory() if step is not None and device.type == "cuda" else step

    background = ThreadPoolExecutor(1, "prefetch", initializer=_set_device, initargs=(device,))
    try:
        ready = deque(background.submit(make) for _ in range(AHEAD))
        while (step := ready.popleft().result()) is not None:
            ready.append(background.submit(make))
            yield step
    finally:
        background.shutdown(wait=True, cancel_futures=True)


def _set_device(device: torch.device) -> None:
    """A new thread starts on the first GPU, where pinning memory would open another CUDA context."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
