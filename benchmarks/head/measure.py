"""Measure time and memory of calls: interleaved, with a cold cache, medians of many runs."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FLUSH_BYTES = 2**28  # well over any L2


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call."""

    median: float
    p20: float
    p80: float


def interleaved(
    calls: Mapping[str, Callable[[], None]],
    device: torch.device,
    iterations: int,
    warmup: int,
    after: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time every call once a round, in a new order each round: clocks drift, and all drift together.

    `after` runs untimed after each call.
    """
    cold = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    for round_index in range(warmup + iterations):
        shuffle(order)
        for name in order:
            cold.zero_()
            milliseconds = _timed(calls[name], device)
            after()
            if round_index >= warmup:
                samples[name].append(milliseconds)
    return {name: _timing(values) for name, values in samples.items()}


def _timed(call: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _timing(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5)
    return Timing(statistics.median(values), fifths[0], fifths[3])


def peak_bytes(call: Callable[[], None], device: torch.device) -> int | None:
    """Peak memory of the call beyond what was allocated before; None on a CPU, where torch counts none."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth(device: torch.device, iterations: int) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB (16 MiB on a CPU)."""
    size = 2**30 if device.type == "cuda" else 2**24
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: discard(target.copy_(source))}, device, iterations, 3)["copy"]
    return 2 * size / (timing.median / 1000)


def discard(_: object) -> None:
    pass


@dataclass(frozen=True)
class Row:
    """One line of a table: a head on a problem. Times in milliseconds; None where refused or not measured."""

    shape: str
    rows: int  # scored tokens
    dtype: str
    variant: str  # plain, frozen head, saturated, from logits
    head: str
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    tflops: float | None = None  # useful work
    share_of_limit: float | None = None
    gb_per_s: float | None = None
    working_mib: float | None = None  # beyond inputs and gradients
    loss_error: float | None = None
    logp_error: float | None = None  # nats, the largest of any sequence
    d_hidden_error: float | None = None
    d_weight_error: float | None = None
    refused: str | None = None


LIMIT = "GEMMs alone"
"""The head of the row for the bare GEMMs."""
