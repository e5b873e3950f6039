"""Packing, planning and order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from harness import random_groups

from madpo.trainer.data.loader import StepRules, plan_step
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.packing import Segment, computed_tokens, filler, pack, plan_micro_batches
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
    assert batch.rows.tolist() == [1, 1, 3, 4, 6, 7]
    assert batch.targets.tolist() == [20, 30, 31, 32, 50, 51]
    assert batch.lengths == (1, 3, 2)
    assert (batch.winners.tolist(), batch.losers.tolist()) == ([1], [0])
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
    assert batch.rows.tolist() == [1, 4, 5, 6, 8, 9]
    assert batch.targets.tolist() == [20, 30, 31, 32, 50, 51]
    assert batch.ends.tolist() == [2, 7, 10]
    shared = pack(groups, scale=0.5)
    for name in ("targets", "seq_lengths", "winners", "losers", "margins", "labels", "sequence_places"):
        assert torch.equal(getattr(batch, name), getattr(shared, name)), name
    assert (batch.lengths, batch.group_sequences) == (shared.lengths, shared.group_sequences)


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_what_is_planned_for_a_group_is_what_it_takes(prefix_sharing):
    groups = [*random_groups(3), *random_groups(2, 1, completions=1), *random_groups(2, 2, completions=7)]
    tokens, sequences = (
        np.array([sum(map(len, group.completions)) for group in groups]),
        np.array([len(group.completions) for group in groups]),
    )
    lengths = tokens + np.array([len(group.prompt) for group in groups])
    planned = computed_tokens(lengths, tokens, sequences, prefix_sharing)
    assert planned.tolist() == [len(pack([g], prefix_sharing=prefix_sharing).input_ids) for g in groups]


class Held:
    """Groups in memory, with the counts that steps are planned from."""

    def __init__(self, groups: list[TokenGroup]) -> None:
        self.groups = groups
        self.sequences = np.array([len(group.completions) for group in groups])
        self.completion_tokens = np.array([sum(map(len, group.completions)) for group in groups])
        self.lengths = self.completion_tokens + np.array([len(group.prompt) for group in groups])
        self.edges = np.array([len(group.edges) for group in groups])
        self.labelled = np.zeros_like(self.edges)

    def __getitem__(self, index: int) -> TokenGroup:
        return self.groups[index]


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_a_step_keeps_to_the_budget_of_what_it_computes(prefix_sharing):
    groups = Held(random_groups(20, completions=3))
    rules = StepRules(Item.EDGE, 100, prefix_sharing)
    steps = [plan_step(groups, np.arange(20), rules, Shard(rank, 2)) for rank in range(2)]
    batches = [batch for step in steps for batch in step.batches]
    tokens = [len(batch.input_ids) for batch in batches if not batch.is_filler]
    assert max(tokens) <= 100 and sum(tokens) == rules.tokens(groups).sum()
    assert sum(len(batch.lengths) for batch in batches if not batch.is_filler) == 60
    scale = next(batch.token_scale for batch in batches if not batch.is_filler)
    assert scale * sum(tokens) == pytest.approx(2)


def test_edges_of_later_groups_point_at_their_own_sequences():
    groups = random_groups(4, completions=3)
    batch = pack(groups)
    assert batch.winners.tolist() == [0, 0, 3, 3, 6, 6, 9, 9]
    assert batch.losers.tolist() == [1, 2, 4, 5, 7, 8, 10, 11]


def test_a_missing_margin_is_nan_and_a_margin_of_zero_is_not():
    batch = pack([TokenGroup([1], [[2], [3]], [(0, 1, None)]), TokenGroup([1], [[2], [3]], [(0, 1, 0.0)])])
    assert math.isnan(batch.margins[0]) and batch.margins[1] == 0.0


def test_filler_weighs_nothing_and_has_a_row_for_every_parameter():
    batch = filler()
    assert batch.scale == 0.0 and batch.is_filler
    assert len(batch.rows) == 1 and not len(batch.winners)


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
