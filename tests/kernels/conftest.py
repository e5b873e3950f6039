"""Fixtures of the kernel tests, which need torch, Triton, numpy and pytest alone."""

import pytest


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several blocks and a tail, as real vocabularies have, at the size of the tests."""
    from madpo.kernels import logit_rows

    monkeypatch.setattr(logit_rows, "BLOCK", 256)


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None:
    """All of them."""
