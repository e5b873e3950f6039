"""How long the loss head's benchmark takes on an H200: the FLOPs of its shapes, and what compiles.

The rates are rough and on the slow side; nothing that is measured depends on them.
"""

from __future__ import annotations

from collections.abc import Iterable

from madpo.benchmarks.head.problems import Shape

NARROW_FLOPS, DOUBLE_FLOPS = 600e12, 40e12
"""Per second, in products of bfloat16 and of float64."""
OVER_THE_PRODUCTS = 2.0
"""Time of a step over that of its products alone, a mean over all heads."""
CHECKS = 4
"""Steps of a head before it is timed: compilation, memory, loss, log-probs."""
COMPILES = ("torch.compile", "torch.compile chunks", "Liger DPO")
COMPILATION, START = 15.0, 1.0
"""Seconds for every problem: of a head that torch compiles, and of any other."""
TRUTHS = 2
"""With the weights, and without for the heads that take none; 10 M H V each."""


def seconds_of(shape: Shape, rows: int, rounds: int, heads: Iterable[str]) -> float:
    """Of one problem: the truth, then each head's checks and rounds."""
    size = rows * shape.hidden * shape.vocab
    names = list(heads)
    steps = len(names) * (rounds + CHECKS) * OVER_THE_PRODUCTS * 8 * size / NARROW_FLOPS
    compilation = sum(COMPILATION if name in COMPILES else START for name in names)
    return TRUTHS * 10 * size / DOUBLE_FLOPS + steps + compilation
