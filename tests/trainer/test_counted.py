"""Messages count in the singular where there is one thing."""

from __future__ import annotations

import pytest

from madpo.trainer.counted import counted


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (12_000, "12,000 rows")]
)
def test_the_noun_agrees_with_the_number(number, text):
    assert counted(number, "row") == text


def test_a_plural_may_be_given():
    assert counted(1, "batch", "batches") == "1 batch"
    assert counted(3, "batch", "batches") == "3 batches"
