"""Memory that nobody wrote holds NaN, and an operation without a deterministic order is an error.

On a GPU it is a warning: the twins use some, our ops are run twice and compared bit for bit.
"""

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import DEVICE


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several blocks and a tail, as real vocabularies have, at the size of the tests."""
    from madpo.kernels import rows

    monkeypatch.setattr(rows, "BLOCK", 256)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=DEVICE == "cuda")
    yield
    torch.use_deterministic_algorithms(False)
