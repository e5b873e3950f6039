"""Metrics: TRL's names, summed on the device, reduced in one collective per log step.

docs/metrics.md says what each name means; this file is the only place that forms them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor

from madpo.trainer.data.packing import PackedBatch
from madpo.trainer.head import scored_span
from madpo.trainer.objectives.base import Item, Objective, Params, Scored
from madpo.trainer.run_folder import metrics_lines

WITH_EXTREMA = frozenset({"madpo/weight"})
"""Metrics logged as name_mean, name_min and name_max instead of a mean alone."""


class Meter:
    """Sums, counts and extrema of named values, in float64 on the device, without a host sync."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}  # name -> (4,) sum, count, -min, max

    def add(self, name: str, values: Tensor) -> None:
        """Fold in the values (k,) of one micro-batch; k may be 0, the name is then known all the same."""
        values = values.detach().double()
        floor = values.new_full((1,), -math.inf)
        total = torch.stack(
            [
                values.sum(),
                values.new_full((), float(len(values))),
                torch.cat((floor, -values)).max(),
                torch.cat((floor, values)).max(),
            ]
        )
        if name in self._totals:
            old = self._totals[name]
            total = torch.cat((old[:2] + total[:2], torch.maximum(old[2:], total[2:])))
        self._totals[name] = total

    def reduce(self) -> dict[str, float]:
        """Means (and extrema) over all ranks, then start anew. One all-gather, one copy to the host."""
        names = sorted(self._totals)
        local = torch.stack([self._totals[name] for name in names])  # (names, 4)
        self._totals = {}
        gathered = local.new_empty((dist.get_world_size() * len(names), 4))
        dist.all_gather_into_tensor(gathered, local)
        everything = gathered.cpu().view(-1, len(names), 4)
        sums, extrema = everything[..., :2].sum(0), everything[..., 2:].amax(0)
        out: dict[str, float] = {}
        for name, (total, count), (minus_min, maximum) in zip(
            names, sums.tolist(), extrema.tolist(), strict=True
        ):
            if not count:
                continue
            if name in WITH_EXTREMA:
                out |= {
                    f"{name}_mean": total / count,
                    f"{name}_min": -minus_min,
                    f"{name}_max": maximum,
                }
            else:
                out[name] = total / count
        return out


def add_batch(
    meter: Meter,
    batch: PackedBatch,
    token_logps: Tensor,  # (M,)
    ref_token_logps: Tensor | None,  # (M,)
    objective: Objective,
    params: Params,
) -> None:
    """Fold one micro-batch's metrics into the meter."""
    keep = 0 if batch.is_filler else None
    with torch.no_grad():
        scored = scored_span(batch, token_logps, ref_token_logps)
        outcome = objective(scored, params)
        meter.add("loss", outcome.losses[:keep])
        for name, values in outcome.stats.items():
            meter.add(name, values[:keep])
        if objective.item is Item.EDGE:
            _add_pairs(meter, scored, getattr(params, "beta", 1.0))
        if ref_token_logps is not None:
            drift = token_logps.double() - ref_token_logps.double()
            meter.add("kl", (drift.square() / 2)[:keep])


def _add_pairs(meter: Meter, scored: Scored, beta: float) -> None:
    logps, lengths = scored.logps, scored.lengths.clamp(min=1)
    chosen, rejected = logps[scored.winners], logps[scored.losers]
    meter.add("logps/chosen", chosen)
    meter.add("logps/rejected", rejected)
    per_token = logps / lengths
    meter.add("lengths/chosen", scored.lengths[scored.winners].double())
    meter.add("lengths/rejected", scored.lengths[scored.losers].double())
    better = per_token[scored.winners] > per_token[scored.losers]
    meter.add("logps/accuracies", (chosen > rejected).double())
    meter.add("logps/accuracies_per_token", better.double())
    if scored.ref_token_logps is None:
        return
    rewards = beta * scored.logratios
    won, lost = rewards[scored.winners], rewards[scored.losers]
    meter.add("rewards/chosen", won)
    meter.add("rewards/rejected", lost)
    meter.add("rewards/margins", won - lost)
    meter.add("rewards/accuracies", (won > lost).double())


class MetricsFile:
    """`metrics.jsonl`: one line per log step, handed to the system before the call returns."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Continue after `resume_step`: lines of later steps belong to work that is done again."""
        path = folder / "metrics.jsonl"
        kept = [line for line in metrics_lines(folder) if json.loads(line)["step"] <= resume_step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self._file: IO[str] = path.open("a")

    def write(self, record: Mapping[str, float]) -> None:
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
