"""Which rank computes which groups of a step, in which micro-batch."""

from __future__ import annotations

import numpy as np

from madpo.trainer.data.lengths import check_budget


def plan_micro_batches(
    lengths: np.ndarray,  # (B,) packed tokens of each group of the step
    budget: int,
    world_size: int,
    costs: np.ndarray | None = None,  # (B,) what each group takes to compute; None: its tokens
) -> list[list[list[int]]]:
    """Spread a step's groups over ranks and micro-batches: [rank][micro] -> positions into `lengths`.

    The fewest micro-batches (the same number on every rank) whose tokens stay within `budget`. Under ZeRO-3
    ranks wait for each other in every micro-batch, so that all cost about the same: the costliest groups
    are placed first, each into the cheapest bin that has room, and bins of similar cost meet. Deterministic.
    Raises UserError if one group exceeds the budget.
    """
    check_budget(lengths, budget)
    costs = lengths if costs is None else costs
    micro_batches = max(1, -(-int(lengths.sum()) // (budget * world_size)))
    while True:
        num_bins = micro_batches * world_size
        # Where the first finds no room, balancing tokens may yet.
        bins = _fill(lengths, costs, budget, num_bins) or _fill(lengths, lengths, budget, num_bins)
        if bins is not None:
            bins.sort(key=lambda positions: -costs[positions].sum())
            return [bins[rank::world_size] for rank in range(world_size)]
        micro_batches += 1


def _fill(lengths: np.ndarray, costs: np.ndarray, budget: int, num_bins: int) -> list[list[int]] | None:
    """Groups in bins of at most `budget` tokens and about the same cost; None if they do not go in."""
    tokens, loads = np.zeros(num_bins, dtype=np.int64), np.zeros(num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for index in np.argsort(-costs, kind="stable"):
        has_room = tokens + lengths[index] <= budget
        if not has_room.any():
            return None
        target = int(np.where(has_room, loads, np.inf).argmin())
        tokens[target] += lengths[index]
        loads[target] += costs[index]
        bins[target].append(int(index))
    return [sorted(positions) for positions in bins]
