"""`incidents.jsonl`: steps that were skipped, or whose gradient or loss stands out, each with its rows."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from madpo.trainer.dist import gathered
from madpo.trainer.run_folder import INCIDENTS

Rows = Callable[[], np.ndarray] | None
"""Gives (B,) the examples of a step; asked only where one is written down."""

SPIKE = 10.0
"""A gradient norm of so many times the median stands out, and a loss so many times as far from the median as
half of all losses are."""
WINDOW, FEWEST = 50, 10
"""The median is one of the last WINDOW steps, and of FEWEST at least."""
LEAST_WIDTH = 0.01
"""Losses are taken to differ by this share of their median, where all are nearly alike."""


class _Before(NamedTuple):
    """The step before, whose numbers may still be on the device."""

    step: int
    rows: Rows
    norm: float | Tensor  # of the gradient, over all ranks
    loss: Tensor  # (2,) sum and count of this rank's losses


class _Judged(NamedTuple):
    """What was found of the loss of the step before."""

    step: int
    rows: Rows
    loss: float  # this rank's
    usual: float  # the median of those before
    is_odd: bool  # whether it is far above them


class Incidents:
    """Looks at the gradient and the loss of every step. All ranks call it at the same places; rank 0 writes.

    It looks one step late, because the numbers have come to the host by then, and no step waits for the
    device.
    """

    def __init__(self, folder: Path, is_main: bool) -> None:
        self._path, self._is_main = folder / INCIDENTS, is_main
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._before: _Before | None = None
        self._judged: _Judged | None = None

    @property
    def is_odd(self) -> bool:
        """Whether this rank's loss in the step before stands out; the ranks must agree to `write_odd`."""
        return self._judged is not None and self._judged.is_odd

    def skipped(self, step: int, rows: Rows, loss: Tensor, in_a_row: int) -> None:
        """Write down a step that changed no weight, as its gradient was not finite.

        `loss` (2,) is the sum and count of this rank's losses.
        """
        losses = gathered(_mean(loss))
        self._write("skipped", step, rows, {"loss_of_ranks": losses, "in_a_row": in_a_row})

    def look_at(self, step: int, rows: Rows, norm: float | Tensor, loss: Tensor) -> None:
        """Look at the step before this one, and write it down if its gradient stands out.

        `norm` is that of the gradient of all ranks; `loss` (2,) is the sum and count of this rank's losses.
        """
        before, self._before = self._before, _Before(step, rows, norm, loss)
        if before is not None:
            self._judge(before)

    def write_odd(self) -> None:
        """Write down the step before this one, as the loss of some rank stood out; all ranks call it."""
        assert self._judged is not None
        step, rows, loss, usual, _ = self._judged
        losses, medians = zip(*gathered((loss, usual)), strict=True)
        facts = {"loss_of_ranks": list(losses), "median_of_ranks": list(medians)}
        self._write("loss spike", step, rows, facts)
        self._judged = self._judged._replace(is_odd=False)

    def close(self) -> None:
        """Look at the last step too."""
        if self._before is not None:
            self._judge(self._before)
            self._before = None
            if any(gathered(self.is_odd)):
                self.write_odd()

    def _judge(self, before: _Before) -> None:
        norm, loss = float(before.norm), _mean(before.loss)
        if len(self._norms) >= FEWEST:
            usual = statistics.median(self._norms)
            if norm > SPIKE * usual:
                facts = {"grad_norm": norm, "median": usual}
                self._write("gradient spike", before.step, before.rows, facts)
        self._norms.append(norm)
        usual = statistics.median(self._losses) if self._losses else math.nan
        is_odd = len(self._losses) >= FEWEST and _is_far_above(usual, loss, self._losses)
        self._judged = _Judged(before.step, before.rows, loss, usual, is_odd)
        if not math.isnan(loss):  # a rank may have had no item of the step
            self._losses.append(loss)

    def _write(self, kind: str, step: int, rows: Rows, facts: dict[str, Any]) -> None:
        if not self._is_main:
            return
        record = {"kind": kind, "step": step, "time": time.time(), **facts, "rows": _numbers(rows)}
        with self._path.open("a") as file:
            file.write(json.dumps(_finite(record)) + "\n")


def _is_far_above(usual: float, loss: float, earlier: Sequence[float]) -> bool:
    width = statistics.median(abs(each - usual) for each in earlier)
    return loss - usual > SPIKE * max(width, LEAST_WIDTH * abs(usual))


def _mean(loss: Tensor) -> float:
    """The mean of a sum and a count (2,); NaN if nothing was counted. Waits for the device."""
    total, count = loss.tolist()
    return total / count if count else math.nan


def _numbers(rows: Rows) -> list[int] | None:
    return None if rows is None else [int(row) for row in rows()]


def _finite(value: Any) -> Any:
    """The value with texts in place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_finite(child) for child in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
