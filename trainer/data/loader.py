"""Steps of packed micro-batches for one rank, from a data order and a token budget."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.packing import PackedBatch, filler, pack, plan_micro_batches
from madpo.trainer.dist import Shard
from madpo.trainer.objectives.base import Item


def step_batches(
    groups: GroupDataset,
    indices: np.ndarray,  # (B,) the groups of the global batch
    item: Item,
    budget: int,
    shard: Shard,
) -> list[PackedBatch]:
    """This rank's micro-batches of one step, as many as on every other rank.

    The loss of the step is the mean over the items of the global batch, whose number is known before
    a group is read. Each micro-batch carries world_size / items as its scale: DeepSpeed averages
    gradients over ranks, and the factor world_size makes that a sum.
    """
    scale = shard.world_size / max(int(item_counts(groups, item)[indices].sum()), 1)
    plan = plan_micro_batches(groups.lengths[indices], budget, shard.world_size)[shard.rank]
    return [
        pack([groups[indices[position]] for position in positions], scale) if positions else filler()
        for positions in plan
    ]


def item_counts(groups: GroupDataset, item: Item) -> np.ndarray:
    """(G,) how many losses of the given unit each group has."""
    return {
        Item.EDGE: groups.edges,
        Item.SEQUENCE: groups.sequences,
        Item.TOKEN: groups.completion_tokens,
    }[item]


def evaluation_batches(
    groups: GroupDataset, item: Item, batch_size: int, budget: int, shard: Shard
) -> Iterator[PackedBatch]:
    """All groups once, in order; the same number of batches on every rank."""
    for start in range(0, len(groups), batch_size):
        indices = np.arange(start, min(start + batch_size, len(groups)))
        yield from step_batches(groups, indices, item, budget, shard)
