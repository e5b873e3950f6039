"""Find the best block size and number of warps for the kernels over logits.

    python -m madpo.benchmarks.head.tune [--all]

It takes Llama 3's vocabulary; with --all two more, for which every kernel is compiled again.
It prints the bandwidth of every choice (bytes that have to move, over time) and its share of a copy's.
The best choice goes into BLOCK and NUM_WARPS in kernels/logit_rows.py, the table into docs/LOG.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch

from madpo.benchmarks.head import measure
from madpo.kernels import logit_rows as kernels
from madpo.kernels.transform import IDENTITY

BLOCKS, WARPS = (1024, 2048, 4096, 8192, 16384), (4, 8, 16)
VOCABS = (128_256, 151_936, 256_000)


def calls(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Callable[[], object], int]]:
    """Primitive's name -> (call, bytes it has to move), on `rows` rows of logits in `dtype`."""
    logits = torch.randn(rows, vocab, dtype=dtype, device=device)
    targets = torch.randint(0, vocab, (rows,), device=device)
    logps, normalisers = torch.empty(2, rows, device=device)
    dloss_dlogps = torch.ones(rows, device=device)

    def stats() -> None:
        kernels.row_stats(logits, targets, logps, normalisers, transform=IDENTITY)

    def gradient() -> torch.Tensor:
        # It overwrites the logits; timing does not depend on their values.
        return kernels.dlogits_(
            logits, targets, normalisers, dloss_dlogps, transform=IDENTITY, dtype=torch.bfloat16
        )

    stats()
    written = rows * vocab * torch.bfloat16.itemsize
    return {"row_stats": (stats, logits.nbytes), "dlogits_": (gradient, logits.nbytes + written)}


def sweep(
    rows: int,
    vocabs: Sequence[int],
    device: torch.device,
    iterations: int,
    choices: Sequence[tuple[int, int]] = tuple(product(BLOCKS, WARPS)),
) -> Iterator[tuple[str, int, str, int, int, float]]:
    """(primitive, V, dtype, block, warps, bytes per second) of every choice."""
    before = kernels.BLOCK, kernels.NUM_WARPS
    try:
        for vocab, dtype in product(vocabs, (torch.float32, torch.bfloat16)):
            for name, (call, moved) in calls(rows, vocab, dtype, device).items():
                for kernels.BLOCK, kernels.NUM_WARPS in choices:
                    timed = {name: lambda call=call: measure.discard(call())}
                    timing = measure.interleaved(timed, device, iterations, 3)[name]
                    rate = moved / (timing.median / 1000)
                    yield name, vocab, str(dtype), kernels.BLOCK, kernels.NUM_WARPS, rate
    finally:
        kernels.BLOCK, kernels.NUM_WARPS = before


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("error: there is no GPU to tune for")
    device = torch.device("cuda")
    copy = measure.copy_bandwidth(device, 20)
    print(f"{torch.cuda.get_device_name()}: a copy moves {copy / 1e9:,.0f} GB/s")
    vocabs = VOCABS if "--all" in sys.argv[1:] else VOCABS[:1]
    for name, vocab, dtype, block, warps, rate in sweep(4096, vocabs, device, 20):
        choice = f"{name:10} V {vocab:7} {dtype:15} {block:6} x {warps:2}"
        print(f"{choice} {rate / 1e9:7,.0f} GB/s {rate / copy:5.0%}")


if __name__ == "__main__":
    main()
