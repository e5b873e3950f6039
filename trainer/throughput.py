"""How fast a run is, how fast its devices could be, and how much memory each phase of a step takes."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from madpo.trainer import out_of_memory
from madpo.trainer.batches.cost import StepWork

PEAK_TFLOPS = {
    "A100": 312.0,
    "L40S": 362.05,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "GB200": 2500.0,
    "B200": 2250.0,
    "MI300X": 1307.4,
}
"""Part of a device's name -> dense bf16 TFLOP/s of its matrix units. Longer names come first: first hit wins.

Sources: data sheets (NVIDIA A100, L40S, H100, H100 NVL, H200, GB200 NVL72, DGX B200; AMD Instinct MI300X).
NVIDIA's give the rate with sparsity, which is twice the dense one.
"""

MEMORY = "perf/peak_memory_gib"


def peak_flops(given_tflops: float | None, device: torch.device, bf16: bool) -> float | None:
    """Peak FLOP/s of one device: the user's number, or the table's in bf16; None if neither says."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda" or not bf16:
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """Peak FLOP/s in bf16 of the device of that name; None if unknown, or a MIG slice of a device."""
    peaks = [peak for part, peak in PEAK_TFLOPS.items() if part in name and "MIG" not in name]
    return peaks[0] * 1e12 if peaks else None


def throughput(
    work: StepWork, steps: int, seconds: float, world_size: int, peak: float | None
) -> dict[str, float]:
    """The `perf/` metrics of `steps` steps that took `seconds`; `peak` is one rank's, in FLOP/s."""
    per_rank = seconds * world_size
    out = {
        "perf/step_time": seconds / steps,
        "perf/tokens_per_second": work.tokens / seconds,
        "perf/padded_tokens_per_second": work.padded_tokens / seconds,
        "perf/prefix_savings": 1 - work.tokens / max(work.unshared_tokens, 1),
        "perf/imbalance": work.busiest / work.mean if work.mean else 1.0,
        "perf/tflops_per_rank": work.flops / per_rank / 1e12,
    }
    if peak is not None:
        out["perf/mfu"] = work.flops / (per_rank * peak)
        out["perf/hfu"] = (work.flops + work.flops_again) / (per_rank * peak)
    return out


class PeakMemory:
    """The most memory that this rank held in each phase.

    On a GPU: what torch allocated there, by its own count, which needs no synchronisation. On a CPU: the
    most that the process has held so far.
    """

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        self._peaks: dict[str, float] = {}  # phase -> GiB

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield
        out_of_memory.note(name)
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else _peak_of_process()
        self._peaks[name] = max(self._peaks.get(name, 0.0), peak / 2**30)

    def take(self) -> dict[str, float]:
        """The peak over all phases and of each phase, as metrics in GiB; then start anew."""
        peaks, self._peaks = self._peaks, {}
        if not peaks:
            return {}
        whole = {MEMORY: max(peaks.values())}
        if not self._on_gpu or len(peaks) == 1:
            return whole
        return whole | {f"{MEMORY}/{name}": peak for name, peak in peaks.items()}


def _peak_of_process() -> int:
    """The most memory that the process has held so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
