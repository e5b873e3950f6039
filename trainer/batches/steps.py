"""Steps of packed micro-batches for one rank, from a data order and a token budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from madpo.trainer.batches.cost import TOKENS, StepCost, StepWork, spared, work_of
from madpo.trainer.batches.micro_batches import plan_micro_batches
from madpo.trainer.batches.packing import PackedBatch, dummy_batch, pack
from madpo.trainer.batches.sequence_slices import slice_of
from madpo.trainer.config.schema import Config
from madpo.trainer.data.groups import TokenGroups
from madpo.trainer.data.lengths import Shapes, check_budget
from madpo.trainer.data.training_source import TrainingSource
from madpo.trainer.dist import Shard
from madpo.trainer.objectives.base import Item


@dataclass(frozen=True)
class StepRules:
    """How groups become steps."""

    item: Item  # the unit that the loss is averaged over
    budget: int  # packed tokens of a micro-batch
    prefix_sharing: bool = True  # a prompt is computed once for all its completions
    cost: StepCost = TOKENS  # what ranks are balanced by
    ranks_per_row: int = 1  # more than one: each has a slice of every row of its group of ranks


class Packs(Protocol):
    """A model, as far as it decides how groups are packed."""

    @property
    def shares_rows(self) -> bool:
        """Whether sequences may share a packed row, and completions their prompt."""
        ...


def step_rules(config: Config, module: Packs | None = None, cost: StepCost = TOKENS) -> StepRules:
    """The rules of a run; without a module those of one in which sequences may share rows."""
    train, shares = config.train, config.model.prefix_sharing and (module is None or module.shares_rows)
    item = config.bound_objective.item
    return StepRules(item, train.row_tokens, shares, cost, train.sequence_parallel_size)


def check_rows_fit(groups: TokenGroups, rules: StepRules) -> None:
    """Raise UserError if a group, as the model computes it, is more than a packed row may hold."""
    check_budget(groups.counts.computed_tokens(rules.prefix_sharing), rules.budget)


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimiser step, or of a stretch of an evaluation."""

    batches: list[PackedBatch]  # as many as on every other rank; all else is of all ranks together
    num_sequences: int
    num_edges: int
    num_groups: int
    work: StepWork
    shapes: Shapes  # of the groups that are computed, whose completions have the places of `batches`
    rules: StepRules
    copies: int = 1  # ranks that share these batches, and know the log-probs of all of their rows
    uncomputed: int = 0  # items of the mean less those computed
    epoch: float = 0.0  # how often training has gone through its groups after this step

    def spared(
        self,
        left_out: np.ndarray,  # (S,) bool, of all completions
    ) -> StepWork:
        """To be added to `work` where the second pass of an objective of the whole batch leaves some out."""
        return spared(self.shapes, left_out, self.rules.cost, self.rules.prefix_sharing)

    def pin_memory(self) -> Step:
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


def plan_step(
    groups: TokenGroups,
    indices: np.ndarray,  # (B,) the groups of the global batch
    rules: StepRules,
    shard: Shard,
) -> Step:
    """This rank's micro-batches of one step.

    The loss of the step is the mean over the items of the global batch, whose number is known before
    a group is read. Each micro-batch carries world_size / items as its scale: DeepSpeed averages
    gradients over ranks, and the factor world_size makes that a sum. What is a mean over packed tokens
    instead has world_size / tokens as its scale. Groups without completions count, and are not computed.
    """
    counts = groups.counts.at(indices)
    items = int(counts.items(rules.item).sum())
    not_computed = counts.counted_edges - counts.edges
    uncomputed = int(not_computed.sum()) if rules.item is Item.EDGE else 0
    skipped = int(not_computed.clip(min=0).sum())
    num_groups, indices = len(indices), indices[counts.sequences > 0]
    counts = groups.counts.at(indices)
    scale = shard.world_size / max(items, 1)
    ends = np.cumsum((counts.sequences, counts.edges), axis=1)  # (2, B)
    places = np.concatenate((np.zeros_like(ends[:, :1]), ends[:, :-1]), axis=1).T.tolist()
    shapes, shared = groups.shapes(indices), rules.prefix_sharing
    lengths = shapes.tokens(shared)
    token_scale = shard.world_size / max(int(lengths.sum()), 1)
    # Not by what is computed again: the user may change that between a run and its continuation, and a
    # group must not move to another micro-batch by it.
    costs = rules.cost.model.of(shapes, shared)
    sharing = rules.ranks_per_row
    bins = shard.world_size // sharing
    plan = plan_micro_batches(lengths, rules.budget, bins, costs)
    known = groups.reference
    batches = [
        pack(
            [groups[indices[p]] for p in positions],
            scale,
            places=[places[p] for p in positions],
            token_scale=token_scale,
            ref_logps=None if known is None else [known[indices[p]] for p in positions],
            prefix_sharing=shared,
        )
        if positions
        else dummy_batch(with_reference=known is not None)
        for positions in plan[shard.rank // sharing]
    ]
    if sharing > 1:
        batches = [slice_of(batch, shard.rank % sharing, sharing) for batch in batches]
    totals = int(counts.sequences.sum()), int(counts.edges.sum())
    work = work_of(shapes, rules.cost, plan, shared, skipped)
    return Step(batches, *totals, num_groups, work, shapes, rules, sharing, uncomputed)


def training_steps(
    source: TrainingSource,
    rules: StepRules,
    batch_size: int,
    shard: Shard,
    consumed: int,
    total: int,
) -> Iterator[Step]:
    """The groups at positions consumed .. total - 1 of the source, `batch_size` at a time."""
    while consumed < total:
        groups, indices = source.take(consumed, min(batch_size, total - consumed))
        consumed += len(indices)
        yield replace(plan_step(groups, indices, rules, shard), epoch=source.epoch(consumed))


def evaluation_steps(
    groups: TokenGroups,
    rules: StepRules,
    batch_size: int,
    shard: Shard,
    selected: np.ndarray | None = None,  # (B,) which groups; None: all
) -> Iterator[Step]:
    """The groups once, in order, in stretches of `batch_size`."""
    selected = np.arange(len(groups.counts)) if selected is None else selected
    for start in range(0, len(selected), batch_size):
        yield plan_step(groups, selected[start : start + batch_size], rules, shard)
