"""Estimate how long the head's benchmark takes on an H200: the FLOPs of its shapes, and compilation.

The rates are rough and on the slow side; nothing that is measured depends on them.
"""

from __future__ import annotations

from collections.abc import Iterable

from madpo.benchmarks.head.problems import Shape

NARROW_FLOPS, DOUBLE_FLOPS = 600e12, 40e12
"""FLOPs per second of products in bfloat16 and in float64."""
OVER_THE_PRODUCTS = 2.0
"""Time of a step over that of its products alone, a mean over all heads."""
CHECKS = 4
"""Steps of a head before it is timed: compilation, memory, loss, log-probs."""
COMPILES = ("torch.compile", "torch.compile chunks", "Liger DPO")
COMPILATION, START = 15.0, 1.0
"""Seconds per problem that a head spends on compilation if torch compiles it, and otherwise."""
TRUTHS = 2
"""Exact answers per problem: with weights, and without for heads that take none; 10 M H V each."""


def seconds_of(shape: Shape, rows: int, rounds: int, heads: Iterable[str]) -> float:
    """Seconds for one problem: the exact answers, then each head's checks and rounds."""
    size = rows * shape.hidden * shape.vocab
    names = list(heads)
    steps = len(names) * (rounds + CHECKS) * OVER_THE_PRODUCTS * 8 * size / NARROW_FLOPS
    compilation = sum(COMPILATION if name in COMPILES else START for name in names)
    return TRUTHS * 10 * size / DOUBLE_FLOPS + steps + compilation
