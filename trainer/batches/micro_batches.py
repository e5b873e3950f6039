"""Which rank computes which groups of a step, in which micro-batch."""

from __future__ import annotations

import numpy as np

from madpo.trainer.data.lengths import check_budget


def plan_micro_batches(
    lengths: np.ndarray,  # (B,) packed tokens of each group of the step
    budget: int,
    world_size: int,
    costs: np.ndarray | None = None,  # (B,) cost of each group; None: its tokens
) -> list[list[list[int]]]:
    """Spread a step's groups over ranks and micro-batches: [rank][micro-batch] -> indices into `lengths`.

    It takes the fewest micro-batches (equally many on every rank) whose tokens stay within `budget`. Under
    ZeRO-3 ranks wait for each other in every micro-batch, so at each of them all ranks should have equal
    cost: the costliest groups are placed first, each into the cheapest bin that has room, and bins of similar
    cost run at the same time. Deterministic. Raises UserError if one group exceeds the budget.
    """
    check_budget(lengths, budget)
    costs = lengths if costs is None else costs
    micro_batches = max(1, -(-int(lengths.sum()) // (budget * world_size)))
    while True:
        num_bins = micro_batches * world_size
        # Balancing tokens may fit where balancing costs does not.
        bins = _fill(lengths, costs, budget, num_bins) or _fill(lengths, lengths, budget, num_bins)
        if bins is not None:
            bins.sort(key=lambda groups: -costs[groups].sum())
            return [bins[rank::world_size] for rank in range(world_size)]
        micro_batches += 1


def _fill(lengths: np.ndarray, costs: np.ndarray, budget: int, num_bins: int) -> list[list[int]] | None:
    """Bins of groups, of at most `budget` tokens and about equal cost; None if the groups do not fit."""
    tokens, loads = np.zeros(num_bins, dtype=np.int64), np.zeros(num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for group in np.argsort(-costs, kind="stable"):
        has_room = tokens + lengths[group] <= budget
        if not has_room.any():
            return None
        target = int(np.where(has_room, loads, np.inf).argmin())
        tokens[target] += lengths[group]
        loads[target] += costs[group]
        bins[target].append(int(group))
    return [sorted(groups) for groups in bins]
