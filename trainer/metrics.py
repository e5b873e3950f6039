"""Metrics under TRL's names: summed on the device, reduced over ranks in one collective per log step.

docs/metrics.md says what each name means; no other file forms a metric of the loss.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor

from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.files import write_atomically
from madpo.trainer.objectives.base import Item, Outcome
from madpo.trainer.objectives.build import BoundObjective
from madpo.trainer.objectives.scores import Scored
from madpo.trainer.pair_margins import PairCollector
from madpo.trainer.run_folder import METRICS, read_metrics
from madpo.trainer.throughput import MEMORY, PeakMemory
from madpo.trainer.waiting import Times

MOMENTS = ("x", "y", "xx", "yy", "xy")
WITH_EXTREMA = frozenset({"madpo/weight"})
"""Metrics logged as name_mean, name_min and name_max, others as their mean."""
OWN_TIME = "own time"
"""What the ranks tell each other for `slowest`."""

Mark = dict[str, Tensor]


class Meter:
    """Sums, counts and extrema of named values, in float64 on the device, without a host sync."""

    def __init__(self, pairs: PairCollector | None = None) -> None:
        self.pairs = pairs  # of an evaluation: keeps every pair's margin
        self._totals: dict[str, Tensor] = {}  # name -> (4,) sum, count, -min, max
        self.memory = PeakMemory()

    def add(self, name: str, values: Tensor, where: Tensor | None = None) -> None:
        """Fold in the values (k,) of one micro-batch, or only those where `where` (k,) is true.

        There may be none; the name is entered all the same, as on the other ranks.
        """
        values = values.detach().double()
        selected = torch.ones_like(values, dtype=torch.bool) if where is None else where
        floor = values.new_full((1,), -math.inf)
        total = torch.stack(
            [
                torch.where(selected, values, 0.0).sum(),
                selected.sum().double(),
                torch.cat((floor, torch.where(selected, -values, -math.inf))).max(),
                torch.cat((floor, torch.where(selected, values, -math.inf))).max(),
            ]
        )
        if name in self._totals:
            old = self._totals[name]
            total = torch.cat((old[:2] + total[:2], torch.maximum(old[2:], total[2:])))
        self._totals[name] = total

    def add_count(self, name: str, count: int) -> None:
        """Add `count` zeros to the mean `name`, which must be known (negative: take them out again)."""
        total = self._totals[name].clone()
        total[1] += count
        self._totals[name] = total

    def add_correlation(self, name: str, x: Tensor, y: Tensor, where: Tensor) -> None:
        """Fold in pairs of values (k,), whose correlation is logged as `name`."""
        x, y = x.double(), y.double()
        for moment, values in zip(MOMENTS, (x, y, x * x, y * y, x * y), strict=True):
            self.add(f"{name} {moment}", values, where)

    def mark(self) -> Mark:
        """What is summed up now, to come `back_to`."""
        return dict(self._totals)

    def back_to(self, mark: Mark) -> None:
        """Forget what was added since the mark."""
        self._totals = dict(mark)

    def since(self, mark: Mark, name: str) -> Tensor:
        """The sum and count (2,) of what this rank has added to `name` since the mark, on the device."""
        now, before = self._totals.get(name), mark.get(name)
        if now is None:
            return torch.zeros(2, dtype=torch.float64)
        return (now if before is None else now - before)[:2]

    @property
    def is_empty(self) -> bool:
        return not self._totals

    def reduce(self, times: Times | None = None) -> dict[str, float]:
        """Means (and extrema) over all ranks; then start anew. One all-gather, one copy to the host.

        For memory, the value of the rank that took the most. Ranks that share rows all add the same values,
        each equally often, which changes no mean. From this rank's `times` follows which one is the slowest.
        """
        device = next(iter(self._totals.values())).device
        for name, gib in self.memory.take().items():
            self.add(name, torch.tensor([gib], device=device))
        if times is not None:
            self.add(OWN_TIME, torch.tensor([times.own], device=device))
        names = sorted(self._totals)
        local = torch.stack([self._totals[name] for name in names])  # (names, 4)
        self._totals = {}
        gathered = local.new_empty((dist.get_world_size() * len(names), 4))
        dist.all_gather_into_tensor(gathered, local)
        by_rank = gathered.cpu().view(-1, len(names), 4)
        sums, extrema = by_rank[..., :2].sum(0), by_rank[..., 2:].amax(0)
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
                out[name] = maximum if name.startswith(MEMORY) else total / count
        if times is not None and len(by_rank) > 1:
            out |= slowest(by_rank[:, names.index(OWN_TIME), 0], times.whole)
        out.pop(OWN_TIME, None)
        return _with_margins(_with_correlations(out))


def slowest(
    own: Tensor,  # (ranks,) seconds between collectives
    whole: float,  # seconds with them
) -> dict[str, float]:
    """The rank that computes longest, and for which share of the time the median rank waits for it."""
    longest, rank = own.max(0)
    return {
        "perf/slowest_rank": int(rank),
        "perf/rank_spread": float(longest - own.quantile(0.5)) / whole,
    }


def _with_margins(record: dict[str, float]) -> dict[str, float]:
    """The record with the margin of labelled completions, which no pair has: that of their mean rewards."""
    chosen, rejected = record.get("rewards/chosen"), record.get("rewards/rejected")
    if chosen is not None and rejected is not None:
        record.setdefault("rewards/margins", chosen - rejected)
    return record


def _with_correlations(record: dict[str, float]) -> dict[str, float]:
    """Replace moments by correlations; none is logged where one of the two values does not vary."""
    for name in [key.removesuffix(" xy") for key in record if key.endswith(" xy")]:
        x, y, xx, yy, xy = (record.pop(f"{name} {moment}") for moment in MOMENTS)
        spread = (xx - x * x) * (yy - y * y)
        if spread > 0:
            record[name] = (xy - x * y) / math.sqrt(spread)
    return record


def add_batch(
    meter: Meter,
    batch: PackedBatch,
    scored: Scored,
    outcome: Outcome,
    objective: BoundObjective,
) -> None:
    """Fold one micro-batch's metrics into the meter. Names depend on the objective alone.

    A dummy batch enters the names and no value.
    """

    def real(values: Tensor) -> Tensor:
        return values[:0] if batch.is_dummy else values

    labelled = batch.labels != 0
    with torch.no_grad():
        where = real(labelled) if objective.item is Item.SEQUENCE else None
        meter.add("loss", real(outcome.losses), where)
        for name, values in outcome.stats.items():
            meter.add(name, real(values), where)
        if objective.item is not Item.TOKEN:
            _add_completions(meter, batch, scored, objective)
        if scored.ref_token_logps is not None:
            drift = scored.token_logps.double() - scored.ref_token_logps.double()
            if objective.item is Item.SEQUENCE:
                where = real(labelled.repeat_interleave(batch.seq_lengths, output_size=len(drift)))
            meter.add("kl", real(drift.square() / 2), where)


def add_stats(meter: Meter, batch: PackedBatch, stats: Mapping[str, Tensor]) -> None:
    """Fold in the model's own statistics: means () over the packed tokens of one micro-batch."""
    for name, value in stats.items():
        meter.add(name, value.expand(0 if batch.is_dummy else len(batch.input_ids)))


def _add_completions(meter: Meter, batch: PackedBatch, scored: Scored, objective: BoundObjective) -> None:
    """Rewards, log-probs and lengths of chosen and rejected (or desirable and undesirable) completions."""
    are_rewards, pairs = objective.is_reward_model, objective.item is Item.EDGE
    per_token = scored.logps / scored.lengths.clamp(min=1)
    rewards = objective.beta * (per_token if scored.ref_token_logps is None else scored.logratios)
    values = {"rewards": rewards, "logps": scored.logps, "lengths": scored.lengths.double()}
    if are_rewards:
        rewards = values["rewards"] = values.pop("logps")
    labels = batch.labels
    sides = {"chosen": (slice(None), labels > 0), "rejected": (slice(None), labels < 0)}
    if pairs:
        sides = {"chosen": (scored.chosen, None), "rejected": (scored.rejected, None)}
    for side, (index, where) in sides.items():
        for name, of_completions in values.items():
            meter.add(f"{name}/{side}", of_completions[index], where)
    meter.add_correlation("rewards/length_correlation", rewards, values["lengths"], labels != 0)
    if not pairs:
        return
    won, lost = scored.chosen, scored.rejected
    margins = rewards[won] - rewards[lost]
    meter.add("rewards/margins", margins)
    if meter.pairs is not None:
        meter.pairs.add(batch.edge_positions, margins)
    meter.add("rewards/accuracies", (rewards[won] > rewards[lost]).double())
    if not are_rewards:
        meter.add("logps/accuracies", (scored.logps[won] > scored.logps[lost]).double())
        meter.add("logps/accuracies_per_token", (per_token[won] > per_token[lost]).double())


class MetricsFile:
    """`metrics.jsonl`: one line per log step, handed to the operating system before the call returns."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        """Continue after `resume_step`: lines of later steps go, as those steps are trained again."""
        path, records = folder / METRICS, read_metrics(folder)
        self.last_step = max((record["step"] for record in records), default=0)  # that was logged
        earlier = [record for record in records if record["step"] <= resume_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in earlier))
        self._file: IO[str] = path.open("a")
        self._is_gone = False  # removed by somebody, which is said once

    def write(self, record: Mapping[str, float]) -> None:
        if os.fstat(self._file.fileno()).st_nlink == 0 and not self._is_gone:
            self._is_gone = True
            print(f"{self._file.name} was removed: its lines are lost", file=sys.stderr, flush=True)
        self._file.write(json.dumps(dict(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
