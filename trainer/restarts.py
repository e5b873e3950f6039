"""Restarts that lead nowhere: a launcher that starts a run again after every failure is told to stop.

torchrun (`--max-restarts`) and Slurm (`--requeue`) say in the environment how often they have started a job
again. A run that they start again and again at one step fails for a reason that stays.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from madpo.trainer.files import write_atomically

COUNTS = "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"
"""Variables in which launchers say how often they have started a job again."""

MOST = 3
"""So many starts at one step; the next one ends."""

STARTS = ".starts.json"


def no_progress(folder: Path, step: int) -> str | None:
    """Note, on one rank, that a start goes on at `step`; the text of an error if it leads nowhere, else None.

    Only starts by a launcher are counted: one by hand begins anew.
    """
    starts = [*(_earlier(folder) if _is_restart() else []), step]
    if len(starts) > MOST and set(starts[-MOST - 1 :]) == {step}:
        return (
            f"the launcher has started this run {MOST} times at step {step}, and it has come to no further "
            f"checkpoint; {folder / 'log.txt'} says why. Started by hand, it tries again"
        )
    with suppress(OSError):  # a start that cannot be noted is not counted
        write_atomically(folder / STARTS, json.dumps(starts[-MOST:]) + "\n")
    return None


def _is_restart() -> bool:
    return any(os.environ.get(name, "0") != "0" for name in COUNTS)


def _earlier(folder: Path) -> list[int]:
    """The steps at which earlier starts went on, the newest last."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / STARTS).read_bytes())
        if isinstance(found, list):
            return [step for step in found if isinstance(step, int)]
    return []
