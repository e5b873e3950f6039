"""Steps of packed micro-batches for one rank, from a data order and a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from madpo.trainer.config import Config
from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.feed import Groups
from madpo.trainer.data.packing import PackedBatch, computed_tokens, filler, pack, plan_micro_batches
from madpo.trainer.dist import Shard
from madpo.trainer.objectives.base import Item


@dataclass(frozen=True)
class StepRules:
    """How groups become steps."""

    item: Item  # the unit that the loss is averaged over
    budget: int  # packed tokens of a micro-batch
    prefix_sharing: bool = True  # a prompt is computed once for all its completions

    def tokens(self, groups: Groups) -> np.ndarray:
        """(G,) the tokens of each group that a forward computes."""
        counts = groups.lengths, groups.completion_tokens, groups.sequences
        return computed_tokens(*counts, self.prefix_sharing)


def step_rules(config: Config, shares_rows: bool = True) -> StepRules:
    """The rules of a run, of a model whose layers let sequences share rows."""
    shares = config.model.prefix_sharing and shares_rows
    return StepRules(config.objective_entry.item, config.train.micro_batch_tokens, shares)


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimiser step, or of a stretch of an evaluation."""

    batches: list[PackedBatch]  # as many as on every other rank
    num_sequences: int  # of all ranks together
    num_edges: int


def plan_step(
    groups: Groups,
    indices: np.ndarray,  # (B,) the groups of the global batch
    rules: StepRules,
    shard: Shard,
) -> Step:
    """This rank's micro-batches of one step.

    The loss of the step is the mean over the items of the global batch, whose number is known before
    a group is read. Each micro-batch carries world_size / items as its scale: DeepSpeed averages
    gradients over ranks, and the factor world_size makes that a sum. What is a mean over packed tokens
    instead has world_size / tokens as its scale.
    """
    scale = shard.world_size / max(int(item_counts(groups, rules.item)[indices].sum()), 1)
    lengths = rules.tokens(groups)[indices]
    token_scale = shard.world_size / int(lengths.sum())
    ends = np.cumsum((groups.sequences[indices], groups.edges[indices]), axis=1)  # (2, B)
    places = np.concatenate((np.zeros_like(ends[:, :1]), ends[:, :-1]), axis=1).T.tolist()
    plan = plan_micro_batches(lengths, rules.budget, shard.world_size)[shard.rank]
    batches = [
        pack(
            [groups[indices[p]] for p in positions],
            scale,
            places=[places[p] for p in positions],
            token_scale=token_scale,
            prefix_sharing=rules.prefix_sharing,
        )
        if positions
        else filler()
        for positions in plan
    ]
    return Step(batches, *ends[:, -1].tolist())


def item_counts(groups: Groups, item: Item) -> np.ndarray:
    """(G,) how many losses of the given unit each group has."""
    return {Item.EDGE: groups.edges, Item.SEQUENCE: groups.labelled, Item.TOKEN: groups.completion_tokens}[
        item
    ]


def evaluation_steps(
    groups: GroupDataset,
    rules: StepRules,
    batch_size: int,
    shard: Shard,
    chosen: np.ndarray | None = None,  # (B,) which groups; None: all
) -> Iterator[Step]:
    """The groups once, in order, in stretches of `batch_size`."""
    chosen = np.arange(len(groups)) if chosen is None else chosen
    for start in range(0, len(chosen), batch_size):
        yield plan_step(groups, chosen[start : start + batch_size], rules, shard)
