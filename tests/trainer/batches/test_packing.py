"""Packing, planning and order."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import random_groups

from madpo.trainer.batches.cost import Cost, StepCost, StepWork, saved_by, work_of
from madpo.trainer.batches.micro_batches import plan_micro_batches
from madpo.trainer.batches.packing import PackedBatch, Segment, dummy_batch, pack
from madpo.trainer.batches.steps import StepRules, check_rows_fit, plan_step
from madpo.trainer.data.groups import GroupCounts, ReferenceLogps
from madpo.trainer.data.lengths import Shapes, shapes_of
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.dist import Shard
from madpo.trainer.objectives.base import Item


def test_pack_by_hand():
    """Prompt 10 11, completions 20 and 30 31 32; then prompt 40, completion 50 51."""
    batch = pack(
        [
            TokenGroup([10, 11], [[20], [30, 31, 32]], [(1, 0, 2.5)]),
            TokenGroup([40], [[50, 51]], []),
        ],
        scale=0.5,
    )
    assert batch.input_ids.tolist() == [10, 11, 20, 30, 31, 32, 40, 50, 51]
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 3, 4, 0, 1, 2]
    assert batch.segments == (
        Segment(0, 2, 0, 0),
        Segment(2, 3, 0, 2),
        Segment(3, 6, 0, 2),
        Segment(6, 9, 6, 6),
    )
    assert batch.scored_positions.tolist() == [1, 1, 3, 4, 6, 7]
    assert batch.targets.tolist() == [20, 30, 31, 32, 50, 51]
    assert batch.lengths == (1, 3, 2)
    assert (batch.chosen.tolist(), batch.rejected.tolist()) == ([1], [0])
    assert batch.margins.tolist() == [2.5]
    assert (batch.group_sequences, batch.group_edges) == ((2, 1), (1, 0))
    assert batch.scale == 0.5


def test_pack_without_sharing_by_hand():
    """The groups of the test above: the first prompt stands before each of its completions."""
    groups = [TokenGroup([10, 11], [[20], [30, 31, 32]], [(1, 0, 2.5)]), TokenGroup([40], [[50, 51]], [])]
    batch = pack(groups, scale=0.5, prefix_sharing=False)
    assert batch.input_ids.tolist() == [10, 11, 20, 10, 11, 30, 31, 32, 40, 50, 51]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.segments == (Segment(0, 3, 0, 0), Segment(3, 8, 3, 3), Segment(8, 11, 8, 8))
    assert batch.scored_positions.tolist() == [1, 4, 5, 6, 8, 9]
    assert batch.targets.tolist() == [20, 30, 31, 32, 50, 51]
    assert batch.ends.tolist() == [2, 7, 10]
    shared = pack(groups, scale=0.5)
    for name in ("targets", "seq_lengths", "chosen", "rejected", "margins", "labels", "sequence_positions"):
        assert torch.equal(getattr(batch, name), getattr(shared, name)), name
    assert (batch.lengths, batch.group_sequences) == (shared.lengths, shared.group_sequences)


def test_pack_with_masks_by_hand():
    """The first group of the tests above: of 30 31 32, the two outer tokens are scored."""
    group = TokenGroup([10, 11], [[20], [30, 31, 32]], [(1, 0, 2.5)], masks=[[True], [True, False, True]])
    batch = pack([group, TokenGroup([40], [[50, 51, 52]], [], masks=[[False, False, True]])])
    assert batch.input_ids.tolist() == [10, 11, 20, 30, 31, 32, 40, 50, 51, 52]
    assert batch.scored_positions.tolist() == [1, 1, 4, 8]
    assert batch.targets.tolist() == [20, 30, 32, 52]
    assert (batch.lengths, batch.ends.tolist()) == ((1, 2, 1), [2, 5, 9])
    rest, kept = batch.without(np.array([True, False, False]))
    assert (rest.input_ids.tolist(), kept.tolist()) == ([10, 11, 30, 31, 32, 40, 50, 51, 52], [1, 2])
    assert (rest.scored_positions.tolist(), rest.targets.tolist()) == ([1, 3, 7], [30, 32, 52])


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_what_is_planned_for_a_group_is_what_it_takes(prefix_sharing):
    groups = [*random_groups(3), *random_groups(2, 1, completions=1), *random_groups(2, 2, completions=7)]
    planned = Held(groups).counts.computed_tokens(prefix_sharing)
    assert planned.tolist() == [len(pack([g], prefix_sharing=prefix_sharing).input_ids) for g in groups]


class Held:
    """Groups in memory, with the counts that steps are planned from."""

    def __init__(self, groups: list[TokenGroup]) -> None:
        self.groups, self.rows = groups, np.arange(len(groups))
        tokens = np.array([sum(map(len, group.completions)) for group in groups])
        edges = np.array([len(group.edges) for group in groups])
        self.counts = GroupCounts.all_computed(
            lengths=tokens + np.array([len(group.prompt) for group in groups]),
            completion_tokens=tokens,
            scored_tokens=np.array([sum(group.scored) for group in groups]),
            sequences=np.array([len(group.completions) for group in groups]),
            edges=edges,
            labelled=np.zeros_like(edges),
        )
        self.reference: ReferenceLogps | None = None

    def __getitem__(self, index: int) -> TokenGroup:
        return self.groups[index]

    def shapes(self, indices: np.ndarray) -> Shapes:
        return shapes_of([self.groups[index] for index in indices])


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_a_step_keeps_to_the_budget_of_what_it_computes(prefix_sharing):
    groups = Held(random_groups(20, completions=3))
    rules = StepRules(Item.EDGE, 100, prefix_sharing)
    steps = [plan_step(groups, np.arange(20), rules, Shard(rank, 2)) for rank in range(2)]
    batches = [batch for step in steps for batch in step.batches]
    tokens = [len(batch.input_ids) for batch in batches if not batch.is_dummy]
    assert max(tokens) <= 100 and sum(tokens) == groups.shapes(np.arange(20)).tokens(prefix_sharing).sum()
    assert sum(len(batch.lengths) for batch in batches if not batch.is_dummy) == 60
    scale = next(batch.token_scale for batch in batches if not batch.is_dummy)
    assert scale * sum(tokens) == pytest.approx(2)


def test_the_work_of_a_step_has_the_head_on_scored_tokens_only():
    groups = Held(
        [
            replace(x, masks=[[i % 3 > 0 for i in range(len(c))] for c in x.completions])
            for x in random_groups(6)
        ]
    )
    rules = StepRules(Item.EDGE, 100, cost=StepCost(Cost(per_row=2.0), again=Cost(per_row=1.0)))
    step = plan_step(groups, np.arange(6), rules, Shard(0, 1))
    scored = sum(len(batch.targets) for batch in step.batches)
    assert scored < groups.counts.completion_tokens.sum()
    assert (step.work.flops, step.work.flops_again) == pytest.approx((2 * scored, scored))
    whole = step.work + step.saved_by(np.ones(step.num_sequences, bool))
    assert (whole.flops, whole.flops_again) == pytest.approx((2 * scored, 0))


def test_a_group_is_measured_as_it_is_computed():
    groups: Any = Held([TokenGroup([3] * 50, [[4] * 10] * 4, [(0, 1, None)])])
    check_rows_fit(groups, StepRules(Item.EDGE, 100))
    with pytest.raises(ValueError, match="cannot hold a group of 240 tokens"):
        check_rows_fit(groups, StepRules(Item.EDGE, 100, prefix_sharing=False))


def test_the_shapes_of_no_group():
    shapes = shapes_of(random_groups(3)).at(np.array([], dtype=np.int64))
    assert len(shapes.tokens()) == len(shapes.completions) == 0


def test_edges_of_later_groups_point_at_their_own_sequences():
    groups = random_groups(4, completions=3)
    batch = pack(groups)
    assert batch.chosen.tolist() == [0, 0, 3, 3, 6, 6, 9, 9]
    assert batch.rejected.tolist() == [1, 2, 4, 5, 7, 8, 10, 11]


def test_a_missing_margin_is_nan_and_a_margin_of_zero_is_not():
    batch = pack([TokenGroup([1], [[2], [3]], [(0, 1, None)]), TokenGroup([1], [[2], [3]], [(0, 1, 0.0)])])
    assert math.isnan(batch.margins[0]) and batch.margins[1] == 0.0


def test_a_dummy_batch_weighs_nothing_and_has_a_row_for_every_parameter():
    batch = dummy_batch()
    assert batch.scale == 0.0 and batch.is_dummy
    assert len(batch.scored_positions) == 1 and not len(batch.chosen)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_plan_places_every_group_once_within_the_budget(world_size):
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths = random.integers(1, 100, random.integers(0, 40))
        plan = plan_micro_batches(lengths, 128, world_size)
        assert len(plan) == world_size
        assert len({len(rank) for rank in plan}) == 1, "every rank runs the same number of passes"
        bins = [positions for rank in plan for positions in rank]
        assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(lengths)))
        assert all(lengths[positions].sum() <= 128 for positions in bins)


def test_plan_balances_ranks():
    lengths = np.array([50, 10, 10, 10, 10, 10])
    (first,), (second,) = plan_micro_batches(lengths, 1000, 2)
    assert {lengths[first].sum(), lengths[second].sum()} == {50}


def lognormal_shapes(random: np.random.Generator, count: int, max_length: int) -> Shapes:
    """Prompts and pairs of completions, long-tailed as in chat data."""
    prompts = np.minimum(random.lognormal(np.log(170), 1.0, count).astype(int) + 5, max_length // 2)
    completions = random.lognormal(np.log(320), 0.9, 2 * count).astype(int) + 5
    return Shapes(prompts, np.full(count, 2), np.minimum(completions, np.repeat(max_length - prompts, 2)))


SMALL_MODEL = StepCost(Cost(per_token=1.0, per_row=0.38, per_attention_pair={None: 1.2e-4}))
"""The proportions of matrices, output head and attention in Qwen2.5-0.5B."""


def imbalance(shapes: Shapes, plan: list[list[list[int]]]) -> float:
    work = work_of(shapes, SMALL_MODEL, plan)
    return work.busiest / work.mean


@pytest.mark.parametrize("count, budget", [(64, 16384), (128, 16384), (256, 16384)])
def test_plan_balances_what_is_computed_in_as_few_micro_batches(count, budget):
    random, tokens, costs = np.random.default_rng(1), [], []
    for _ in range(20):
        shapes = lognormal_shapes(random, count, 8192)
        lengths = shapes.tokens().astype(int)
        by_tokens = plan_micro_batches(lengths, budget, 8)
        by_costs = plan_micro_batches(lengths, budget, 8, SMALL_MODEL.model.of(shapes))
        assert len(by_costs[0]) == len(by_tokens[0])
        assert all(lengths[positions].sum() <= budget for rank in by_costs for positions in rank)
        tokens.append(imbalance(shapes, by_tokens))
        costs.append(imbalance(shapes, by_costs))
    assert np.mean(costs) < 1.03
    assert np.mean(costs) - 1 < 0.5 * (np.mean(tokens) - 1)


def test_bins_of_similar_cost_meet():
    """Two long groups and many short ones: the long ones are computed at the same time."""
    lengths, costs = np.array([10, 1, 1, 1, 1, 10]), np.array([100, 1, 1, 1, 1, 100])
    plan = plan_micro_batches(lengths, 10, 2, costs)
    assert [[costs[positions].sum() for positions in rank] for rank in plan] == [[100, 2], [100, 2]]


def test_where_costs_leave_no_room_tokens_are_balanced():
    """Costliest first, the group of 7 tokens would meet bins of 7 and 6."""
    lengths, costs = np.array([7, 4, 3, 3, 3]), np.array([1, 2, 9, 8, 7])
    plan = plan_micro_batches(lengths, 10, 2, costs)
    assert {lengths[positions].sum() for (positions,) in plan} == {10}


def test_shapes_by_hand():
    """Prompt of 2 with completions of 3 and 1, prompt of 4 with one of 2; windows of 3."""
    shapes = Shapes(np.array([2, 4]), np.array([2, 1]), np.array([3, 1, 2]))
    assert shapes.tokens().tolist() == [6, 6]
    assert shapes.tokens(shared=False).tolist() == [8, 6]
    # 1 + 2 for the prompt, 3 + 4 + 5 and 3 for its completions; 1 + .. + 6.
    assert shapes.attention_pairs().tolist() == [18, 21]
    assert shapes.attention_pairs(shared=False).tolist() == [21, 21]
    assert shapes.attention_pairs(window=3).tolist() == [1 + 2 + 9 + 3, 1 + 2 + 3 + 9]
    assert shapes.padded_tokens(1) == 3 * 6
    assert shapes.padded_tokens(2) == shapes.padded_tokens(5) == 2 * 5 + 6
    assert shapes.at(np.array([1, 0, 1])).completions.tolist() == [2, 3, 1, 2]
    cost = Cost(10.0, 1.0, {None: 0.5, 3: 1.0})
    assert cost.of(shapes).tolist() == [60 + 4 + 9 + 15, 60 + 2 + 10.5 + 15]
    assert (cost + cost).of(shapes).tolist() == (2 * cost.of(shapes)).tolist()


def test_work_by_hand():
    shapes = Shapes(np.array([1, 2, 3]), np.array([2, 2, 2]), np.array([1, 1, 2, 2, 3, 3]))
    cost = StepCost(Cost(per_token=1.0), again=Cost(per_token=0.5))
    work = work_of(shapes, cost, [[[0, 1], [2]], [[], []]])
    assert work == StepWork(18, 24, 4 + 8 + 12, 18.0, 9.0, 18.0, 9.0)
    assert work + work == StepWork(36, 48, 48, 36.0, 18.0, 36.0, 18.0)


def test_what_a_second_pass_saves_by_skipping_by_hand():
    shapes = Shapes(np.array([1, 2, 3]), np.array([2, 2, 2]), np.array([1, 1, 2, 2, 3, 3]))
    skipped = np.array([True, False, False, False, True, True])
    remaining = shapes.without(skipped)
    assert (remaining.tokens().tolist(), remaining.sequences.tolist()) == ([1 + 1, 2 + 2 + 2, 0], [1, 2, 0])
    cost = StepCost(Cost(per_token=9.0), Cost(per_token=2.0), Cost(per_token=1.0), Cost(per_row=1.0))
    less = StepWork(flops=-2.0 * 10, flops_again=-1.0 * 10 - 7)
    assert saved_by(shapes, skipped, cost) == less
    assert saved_by(shapes, ~skipped & skipped, cost) == StepWork()


def visible(batch: PackedBatch) -> torch.Tensor:
    """(N, N) which queries see which keys."""
    sees = torch.zeros(len(batch.input_ids), len(batch.input_ids), dtype=torch.bool)
    for start, end, prompt_start, prompt_end in batch.segments:
        sees[start:end, prompt_start:prompt_end] = True
        sees[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    return sees


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("skipped", ["1000000", "0110000", "1111110", "0001101", "1111111", "0000000"])
def test_a_batch_without_completions_is_that_of_groups_without_them(skipped, prefix_sharing):
    groups = [group for n in (2, 1, 4) for group in random_groups(1, n, completions=n)]
    gone = np.array([letter == "1" for letter in skipped])
    whole = pack(groups, 0.25, prefix_sharing=prefix_sharing)
    got, left = whole.without(gone)
    kept, first = [], 0
    if gone.all():
        gone[np.argmin(whole.lengths)] = False
    for group in groups:
        stays = [not out for out in gone[first : first + len(group.completions)]]
        first += len(stays)
        if any(stays):
            kept.append(
                replace(group, completions=list(itertools.compress(group.completions, stays)), edges=[])
            )
    want = pack(kept, 0.25, prefix_sharing=prefix_sharing)
    for name in ("input_ids", "position_ids", "scored_positions", "targets", "ends", "seq_lengths"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert (got.lengths, got.group_sequences, got.scale) == (
        want.lengths,
        want.group_sequences,
        0.25,
    )
    assert got.sequence_positions.tolist() == np.flatnonzero(~gone).tolist() == left.tolist()
    assert torch.equal(visible(got), visible(want))


def test_plan_refuses_a_group_over_the_budget():
    with pytest.raises(ValueError, match=r"micro_batch_tokens: 64 cannot hold a group of 65 tokens"):
        plan_micro_batches(np.array([3, 65]), 64, 2)


def test_order_visits_every_group_once_per_epoch_and_shuffles_anew():
    order = DataOrder(10, seed=3)
    first, second = order.take(0, 10), order.take(10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert DataOrder(10, seed=4).take(0, 10).tolist() != first.tolist()


def test_order_is_the_same_however_it_is_read():
    whole = DataOrder(7, seed=0).take(0, 40)
    fresh = DataOrder(7, seed=0)
    assert fresh.take(33, 7).tolist() == whole[33:].tolist()
    assert np.concatenate([fresh.take(i, 3) for i in range(0, 39, 3)]).tolist() == whole[:39].tolist()


def test_order_is_pinned():
    """A change here changes every user's run on resume."""
    assert DataOrder(8, seed=42).take(0, 8).tolist() == PINNED


PINNED = [7, 1, 6, 4, 3, 5, 0, 2]
