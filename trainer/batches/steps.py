"""Steps: one rank's packed micro-batches, planned from a data order and a token budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from madpo.trainer.batches.cost import TOKENS, StepCost, StepWork, saved_by, work_of
from madpo.trainer.batches.micro_batches import plan_micro_batches
from madpo.trainer.batches.packing import PackedBatch, dummy_batch, pack
from madpo.trainer.batches.sequence_slices import slice_of
from madpo.trainer.config.schema import Config
from madpo.trainer.data.groups import GroupCounts, TokenGroups
from madpo.trainer.data.lengths import PositionBorder, Shapes, Shared, check_budget
from madpo.trainer.data.training_source import TrainingSource
from madpo.trainer.dist import Shard
from madpo.trainer.objectives.base import Item


@dataclass(frozen=True)
class StepRules:
    """How groups become steps."""

    item: Item  # the unit that the loss is averaged over
    budget: int  # packed tokens that a micro-batch may hold
    prefix_sharing: bool = True  # a prompt is computed once for all its completions
    borders: tuple[PositionBorder, ...] = ()  # of the models' positions; may part completions of a prompt
    cost: StepCost = TOKENS  # what ranks are balanced by
    ranks_per_row: int = 1  # sequence parallelism: so many ranks share a row, each has a slice of it

    def shared(self, shapes: Shapes) -> Shared:
        """Which of these groups are computed with their prompt once."""
        if not self.prefix_sharing or not self.borders:
            return self.prefix_sharing
        return shapes.shares_prompts(self.borders)


class Packs(Protocol):
    """A model, as far as it decides how groups are packed."""

    @property
    def shares_rows(self) -> bool:
        """Whether sequences may share a packed row, and completions their prompt."""
        ...

    @property
    def borders(self) -> tuple[PositionBorder, ...]:
        """Lengths beyond which the models encode positions otherwise."""
        ...


def step_rules(config: Config, module: Packs | None = None, cost: StepCost = TOKENS) -> StepRules:
    """The rules of a run. Without a module, sequences are taken to be able to share rows."""
    train, shares = config.train, config.model.prefix_sharing and (module is None or module.shares_rows)
    item, borders = config.bound_objective.item, () if module is None else module.borders
    return StepRules(item, train.row_tokens, shares, borders, cost, train.sequence_parallel_size)


def check_rows_fit(groups: TokenGroups, rules: StepRules) -> None:
    """Raise UserError if a group, as the model computes it, has more tokens than a packed row may hold."""
    check_budget(groups.counts.computed_tokens(rules.prefix_sharing), rules.budget)
    if rules.borders:
        least = min(border.length for border in rules.borders)
        shapes = groups.shapes(np.flatnonzero(groups.counts.lengths > least))
        check_budget(shapes.tokens(rules.shared(shapes)), rules.budget)


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimiser step, or of a chunk of an evaluation.

    `batches` are this rank's; all other numbers are those of all ranks together.
    """

    batches: list[PackedBatch]  # equally many on every rank
    num_sequences: int
    num_edges: int
    num_groups: int
    work: StepWork
    shapes: Shapes  # lengths of the computed groups; completions in the order of `sequence_positions`
    scored: np.ndarray  # (B,) the share of each computed group's completion tokens that is scored
    rules: StepRules
    copies: int = 1  # ranks that hold these same batches, each a slice of every row
    skipped_items: int = 0  # items in the mean loss less items computed; negative if more are computed
    epoch: float = 0.0  # passes over the training groups, up to and with this step
    rows: Callable[[], np.ndarray] | None = None  # gives (B,) the examples that its groups come from

    def saved_by(
        self,
        skipped: np.ndarray,  # (S,) bool, of all completions of the step
    ) -> StepWork:
        """The (negative) change in `work` if the second pass of a global-batch objective skips these."""
        return saved_by(self.shapes, skipped, self.rules.cost, self.rules.shared(self.shapes), self.scored)

    def pin_memory(self) -> Step:
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


def plan_step(
    groups: TokenGroups,
    indices: np.ndarray,  # (B,) the groups of the global batch
    rules: StepRules,
    shard: Shard,
) -> Step:
    """This rank's micro-batches of one step.

    Groups without completions, which a view left without any edge, count in the mean and are not computed.
    """
    all_counts = groups.counts.at(indices)
    computed = indices[all_counts.sequences > 0]
    counts, shapes = groups.counts.at(computed), groups.shapes(computed)
    weights = _weights_of_step(all_counts, shapes, rules, shard)
    assignment = _assignment(shapes, rules, shard)
    scored = counts.scored_tokens / np.maximum(counts.completion_tokens, 1)
    shared = rules.shared(shapes)
    own = assignment[shard.rank // rules.ranks_per_row]
    return Step(
        batches=_packed(groups, computed, own, shapes, weights, rules, shard),
        num_sequences=int(counts.sequences.sum()),
        num_edges=int(counts.edges.sum()),
        num_groups=len(indices),
        work=work_of(shapes, rules.cost, assignment, shared, scored, weights.skipped_edges),
        shapes=shapes,
        scored=scored,
        rules=rules,
        copies=rules.ranks_per_row,
        skipped_items=weights.skipped_items,
    )


class _StepWeights(NamedTuple):
    """What the losses of a step are multiplied by, and what is in its mean without being computed."""

    scale: float
    token_scale: float
    skipped_items: int
    skipped_edges: int


def _weights_of_step(
    counts: GroupCounts,  # of all groups of the global batch
    shapes: Shapes,  # of those that are computed
    rules: StepRules,
    shard: Shard,
) -> _StepWeights:
    """The loss of a step is the mean over the items of the global batch, whose number is known before a
    group is read. So each micro-batch is scaled by world_size / items: DeepSpeed averages gradients over
    ranks, and the factor world_size makes that a sum. A mean over packed tokens is scaled by
    world_size / tokens.
    """
    items = int(counts.items(rules.item).sum())
    tokens = int(shapes.tokens(rules.shared(shapes)).sum())
    skipped = counts.items(rules.item) - counts.computed_items(rules.item)
    skipped_edges = (counts.counted_edges - counts.edges).clip(min=0)
    return _StepWeights(
        scale=shard.world_size / max(items, 1),
        token_scale=shard.world_size / max(tokens, 1),
        skipped_items=int(skipped.sum()),  # negative where a group of several items counts as one
        skipped_edges=int(skipped_edges.sum()),
    )


def _assignment(shapes: Shapes, rules: StepRules, shard: Shard) -> list[list[list[int]]]:
    """Who computes what: [rank, or ranks that share a row][micro-batch] -> indices into `shapes`."""
    # The cost leaves out what is recomputed to save memory: a continuation may set that otherwise, and must
    # put every group into the same micro-batch.
    costs = rules.cost.model.of(shapes, rules.shared(shapes))
    lengths = shapes.tokens(rules.shared(shapes))
    return plan_micro_batches(lengths, rules.budget, shard.world_size // rules.ranks_per_row, costs)


def _packed(
    groups: TokenGroups,
    computed: np.ndarray,  # (b,) the groups of the step that are computed
    own: list[list[int]],  # [micro-batch] -> indices into `computed`
    shapes: Shapes,  # of these groups
    weights: _StepWeights,
    rules: StepRules,
    shard: Shard,
) -> list[PackedBatch]:
    counts, reference = groups.counts.at(computed), groups.reference
    first_sequences = np.cumsum(counts.sequences) - counts.sequences
    first_edges = np.cumsum(counts.edges) - counts.edges
    first_positions = list(zip(first_sequences.tolist(), first_edges.tolist(), strict=True))
    shared = np.broadcast_to(rules.shared(shapes), len(computed))
    batches: list[PackedBatch] = []
    for members in own:
        if not members:
            batches.append(dummy_batch(with_reference=reference is not None))
            continue
        batch = pack(
            [groups[computed[member]] for member in members],
            weights.scale,
            first_positions=[first_positions[member] for member in members],
            token_scale=weights.token_scale,
            ref_logps=None if reference is None else [reference[computed[member]] for member in members],
            prefix_sharing=shared[members].tolist(),
        )
        batches.append(batch)
    if rules.ranks_per_row == 1:
        return batches
    index = shard.rank % rules.ranks_per_row
    return [slice_of(batch, index, rules.ranks_per_row) for batch in batches]


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
        step = plan_step(groups, indices, rules, shard)
        yield replace(step, epoch=source.epoch(consumed), rows=partial(_rows_at, groups, indices))


def _rows_at(groups: TokenGroups, indices: np.ndarray) -> np.ndarray:
    """(B,) the examples that groups come from; a view looks through all of its groups for that."""
    return groups.rows[indices]


def evaluation_steps(
    groups: TokenGroups,
    rules: StepRules,
    batch_size: int,
    shard: Shard,
    selected: np.ndarray | None = None,  # (B,) indices of groups; None: all
) -> Iterator[Step]:
    """The groups once, in order, in chunks of `batch_size`."""
    selected = np.arange(len(groups.counts)) if selected is None else selected
    for start in range(0, len(selected), batch_size):
        yield plan_step(groups, selected[start : start + batch_size], rules, shard)
