"""How long tests wait: one factor for all deadlines, MADPO_TEST_PATIENCE.

Deadlines end what hangs; no test measures by them. A machine that does other work beside the tests needs
longer ones, and they cost nothing where nothing hangs.
"""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("MADPO_TEST_PATIENCE", "1"))


def patient(amount: float) -> float:
    """A deadline, in whatever unit, that is stretched by the factor."""
    return amount * PATIENCE
