"""`incidents.jsonl`: steps that were skipped, and steps whose gradient stands out, each with its rows."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from madpo.trainer.dist import gathered
from madpo.trainer.run_folder import INCIDENTS

Rows = Callable[[], np.ndarray] | None
"""Gives (B,) the examples of a step; asked only where one is written down."""

SPIKE = 10.0
"""A gradient norm of so many times the median stands out."""
WINDOW, FEWEST = 50, 10
"""The median is one of the last WINDOW steps, and of FEWEST at least."""


class Incidents:
    """Looks at the gradient of every step. All ranks call it at the same places; rank 0 writes."""

    def __init__(self, folder: Path, is_main: bool) -> None:
        self._path, self._is_main = folder / INCIDENTS, is_main
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._waiting: tuple[int, Rows, float | Tensor] | None = None

    def skipped(self, step: int, rows: Rows, loss: float, in_a_row: int) -> None:
        """Write down a step that changed no weight, as its gradient was not finite. `loss` is this rank's."""
        losses = gathered(loss)
        self._write("skipped", step, rows, {"loss_of_ranks": losses, "in_a_row": in_a_row})

    def look_at(self, step: int, rows: Rows, norm: float | Tensor) -> None:
        """Write down the step before this one, if its gradient stands out.

        One step late, because its norm has come to the host by then, and no step waits for the device.
        """
        before, self._waiting = self._waiting, (step, rows, norm)
        if before is not None:
            self._judge(*before)

    def close(self) -> None:
        """Look at the last step too."""
        if self._waiting is not None:
            self._judge(*self._waiting)
            self._waiting = None

    def _judge(self, step: int, rows: Rows, norm: float | Tensor) -> None:
        value = float(norm)
        if len(self._norms) >= FEWEST:
            usual = statistics.median(self._norms)
            if value > SPIKE * usual:
                self._write("gradient spike", step, rows, {"grad_norm": value, "median": usual})
        self._norms.append(value)

    def _write(self, kind: str, step: int, rows: Rows, facts: dict[str, Any]) -> None:
        if not self._is_main:
            return
        record = {"kind": kind, "step": step, "time": time.time(), **facts, "rows": _numbers(rows)}
        with self._path.open("a") as file:
            file.write(json.dumps(_finite(record)) + "\n")


def _numbers(rows: Rows) -> list[int] | None:
    return None if rows is None else [int(row) for row in rows()]


def _finite(value: Any) -> Any:
    """The value with texts in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_finite(child) for child in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
