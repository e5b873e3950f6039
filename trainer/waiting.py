"""What of a step's time is this rank's own, and what it spends waiting for others in collectives.

All ranks of a step take equally long, as each collective waits for the last one to come. So a slow rank is
told by its waiting least.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all_single",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
"""The methods of DeepSpeed's communication backend that wait, or return something to wait for."""

_counting: StepClock | None = None


class Times(NamedTuple):
    """Seconds since the last log line."""

    whole: float  # without evaluations and checkpoints
    own: float  # without waiting in collectives


class StepClock:
    """The time of training steps. It runs from its creation; the newest clock counts the waits."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._is_waiting = False
        self._start()

    def take(self) -> Times:
        """The times until now; then start anew. It waits for the GPU, which the host has outrun."""
        if self._on_gpu:
            torch.cuda.synchronize()
        whole = time.perf_counter() - self._since
        waited = self._waited + sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        self._start()
        return Times(whole, max(0.0, whole - waited))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager: what is done inside is no part of a step."""
        global _counting
        _counting, began = None, time.perf_counter()
        yield
        self._since += time.perf_counter() - began
        _counting = self

    def stop(self) -> None:
        """Count no more waits."""
        global _counting
        _counting = None

    def begin(self) -> Any:
        """Begin to wait; returns what `end` needs, None if this rank waits already.

        Collectives may be made of others. On a GPU the stream waits that is current.
        """
        if self._is_waiting:
            return None
        self._is_waiting = True
        return self._event() if self._on_gpu else time.perf_counter()

    def end(self, begun: Any) -> None:
        """End what has begun."""
        if begun is None:
            return
        self._is_waiting = False
        if self._on_gpu:
            self._spans.append((begun, self._event()))
        else:
            self._waited += time.perf_counter() - begun

    def _start(self) -> None:
        global _counting
        _counting = self
        self._since, self._waited = time.perf_counter(), 0.0
        self._spans: list[tuple[Any, Any]] = []  # events of the stream, before and after a wait

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def waited() -> Iterator[None]:
    """Context manager: a collective that is done inside counts as waiting, if a clock runs."""
    clock = _counting
    begun = None if clock is None else clock.begin()
    try:
        yield
    finally:
        if clock is not None:
            clock.end(begun)


def count_waits(backend: Any) -> None:
    """Have the collectives of DeepSpeed's communication backend counted as waiting, from now on."""
    for name in COLLECTIVES:
        if name not in vars(backend):
            setattr(backend, name, _counted(getattr(backend, name)))


def _counted(collective: Callable[..., Any]) -> Callable[..., Any]:
    timed = _timed(collective)

    def counted(*args: Any, **options: Any) -> Any:
        handle = timed(*args, **options)
        return handle if handle is None or _counting is None else _Handle(handle)

    return counted


class _Handle:
    """A collective under way, whose `wait` counts as waiting."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self.wait = _timed(handle.wait)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose time counts as waiting; it costs a third of `waited`, for the many in a step."""

    def timed(*args: Any, **options: Any) -> Any:
        clock = _counting
        if clock is None:
            return function(*args, **options)
        begun = clock.begin()
        try:
            return function(*args, **options)
        finally:
            clock.end(begun)

    return timed
