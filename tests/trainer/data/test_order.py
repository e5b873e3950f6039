"""The order of groups to the bit: what is drawn in an epoch of a seed never changes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from madpo.trainer.data.order import DataOrder, permutation, systematic_draws

WEIGHTS = np.array([0.0, 3.0, 1.0, 0.5, 0.0, 1.5, 0.1, 0.3])


def first_word(seed: int, epoch: int, stream: int) -> float:
    """The first number of a stream of Philox, in [0, 1), of its 53 leading bits."""
    word = int(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]).random_raw(1)[0])
    return (word >> 11) / 2**53


def draws_by_hand(weights: np.ndarray, shift: float) -> list[int]:
    """Evenly spaced points over the weights laid end to end, one after another."""
    total, out = float(weights.sum()), []
    for number in range(len(weights)):
        point, place = (number + shift) * total / len(weights), 0
        while point >= weights[: place + 1].sum():
            place += 1
        out.append(place)
    return out


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (42, 0), (42, 1), (7, 3), (2**32 - 1, 5)])
def test_draws_by_weight_are_shifted_by_a_number_of_their_own(seed, epoch):
    """Not by a word of the permutation, which would tie what is drawn to the order that it comes in."""
    random = np.random.default_rng(seed)
    weights = random.exponential(size=200)
    shift, of_permutation = first_word(seed, epoch, 2), first_word(seed, epoch, 0)
    want = draws_by_hand(weights, shift)
    assert systematic_draws(weights, seed, epoch).tolist() == want
    assert want != draws_by_hand(weights, of_permutation), "the two must differ for this to prove anything"


def test_draws_are_pinned():
    """A change here changes every user's run on resume."""
    assert [systematic_draws(WEIGHTS, 42, epoch).tolist() for epoch in range(3)] == PINNED_DRAWS
    assert DataOrder(8, 42, weights=WEIGHTS).take(0, 16).tolist() == PINNED_WEIGHTED


def test_shuffles_of_later_epochs_and_larger_sets_are_pinned():
    assert DataOrder(8, seed=42).take(8, 16).tolist() == PINNED_LATER
    whole = permutation(100_000, 3, 2).astype("<i8").tobytes()
    assert hashlib.sha256(whole).hexdigest()[:16] == PINNED_LARGE


def test_seed_and_epoch_are_not_interchangeable():
    assert permutation(50, 1, 2).tolist() != permutation(50, 2, 1).tolist()
    weights = np.random.default_rng(0).exponential(size=50)
    assert systematic_draws(weights, 1, 2).tolist() != systematic_draws(weights, 2, 1).tolist()


def test_a_point_on_the_border_belongs_to_the_group_that_begins_there():
    """With equal weights and no shift every point is a border; a group of weight 0 is never drawn."""

    class Unshifted:
        def __init__(self, **_: object) -> None:
            pass

        def random_raw(self, count: int) -> np.ndarray:
            return np.zeros(count, dtype=np.uint64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "Philox", Unshifted)
        assert systematic_draws(np.ones(4), 0, 0).tolist() == [0, 1, 2, 3]
        assert systematic_draws(np.array([0.0, 2.0, 0.0, 2.0]), 0, 0).tolist() == [1, 1, 3, 3]


def test_a_point_that_rounding_puts_behind_the_last_weight_draws_the_last_group_of_some_weight():
    class Last:
        def __init__(self, **_: object) -> None:
            pass

        def random_raw(self, count: int) -> np.ndarray:
            return np.full(count, 2**64 - 1, dtype=np.uint64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "Philox", Last)
        for weights in (np.array([0.1] * 10 + [0.0]), np.array([1.0, 1e-17]), np.array([0.7, 0.1, 0.0, 0.0])):
            drawn = systematic_draws(weights, 0, 0)
            assert len(drawn) == len(weights) and (weights[drawn] > 0).all()


def test_by_ease_every_epoch_goes_from_easy_to_hard_and_shuffles_what_is_equally_easy():
    ease = np.array([1.0, 3.0, 1.0, 2.0, 1.0, 3.0, 1.0, 1.0])
    order = DataOrder(8, 3, ease=ease)
    epochs = [order.take(8 * epoch, 8).tolist() for epoch in range(4)]
    for epoch in epochs:
        assert ease[epoch].tolist() == sorted(ease, reverse=True)
        assert sorted(epoch) == list(range(8))
    assert len({tuple(epoch[3:]) for epoch in epochs}) == 4
    assert epochs[0][3:] == [x for x in permutation(8, 3, 0).tolist() if ease[x] == 1.0]


def test_a_step_over_the_end_of_an_epoch_takes_from_both():
    order = DataOrder(5, 9)
    assert order.take(3, 4).tolist() == [*permutation(5, 9, 0)[3:], *permutation(5, 9, 1)[:2]]
    assert order.take(4, 7).tolist() == [
        *permutation(5, 9, 0)[4:],
        *permutation(5, 9, 1),
        *permutation(5, 9, 2)[:1],
    ]
    assert order.take(0, 0).tolist() == []


PINNED_DRAWS = [[1, 1, 1, 1, 2, 3, 5, 5], [1, 1, 1, 1, 2, 3, 5, 5], [1, 1, 1, 1, 2, 3, 5, 5]]
PINNED_WEIGHTED = [5, 1, 5, 2, 1, 3, 1, 1, 2, 3, 1, 1, 1, 5, 1, 5]
PINNED_LATER = [4, 5, 3, 0, 2, 7, 1, 6, 6, 0, 7, 2, 5, 1, 4, 3]
PINNED_LARGE = "f4eca4ec739af722"
