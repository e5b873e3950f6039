"""Fixtures of the kernel tests, which need torch, Triton, numpy and pytest alone."""

import pytest


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give rows of the tests' size several blocks and a tail, as real vocabularies have."""
    from madpo.kernels import logit_rows

    monkeypatch.setattr(logit_rows, "BLOCK", 256)


@pytest.fixture(autouse=True)
def _poisoned(poisoned: None) -> None:
    """Poison unwritten memory in every test."""
