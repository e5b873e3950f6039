"""A whole training step against TRL's, and against ours with a feature off. `madpo bench step` runs it.

Every contender trains the same model on the same pairs in the same order, in processes of its own, one
block of steps at a time. On a CPU all contenders run a block in every round, in a new order, so that a busy
machine slows all of them. On a GPU, where there is no memory for all, one finishes before the next starts.
The result of a contender is the median over rounds of the first contender's (TRL's) time over its own. No
speed is reported of a contender whose losses differ from the first one's.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from madpo.benchmarks.step.pair_source import Packing
from madpo.benchmarks.step.worker import Block, Contender, Job
from madpo.benchmarks.step.workload import Workload, make_workload, real_tokens, step_flops
from madpo.trainer.dist import device as this_device
from madpo.trainer.errors import UserError
from madpo.trainer.model.lora import require_peft
from madpo.trainer.packages import install
from madpo.trainer.throughput import peak_flops

TRL, MADPO = "TRL", "madpo"
CACHED = "reference cached"
TRL_DEFAULT = 8
"""The default of its per_device_train_batch_size."""
TRIAL_ROUNDS = 3
LOSS_TOLERANCE = {False: 1e-4, True: 2e-2}
"""bf16 or not -> the largest difference of a block's mean loss that rounding explains. In bf16 a few steps
hardly move the loss by more, so only a run in float32 shows that contenders do the same work."""


class Variant(NamedTuple):
    """How a contender of ours differs from the defaults."""

    overrides: tuple[str, ...] = ()  # of our config
    packing: Packing = "balanced"
    one_traversal: bool = True
    cached: bool = False  # the reference is scored before training
    may_fail: bool = False  # its overrides are the user's, so an error is a result


def variants(ranks: int, lora: bool) -> dict[str, Variant]:
    """Our trainer, and our trainer with one feature changed, to see what the feature is worth."""
    other_stage = 3 if ranks == 1 else 2
    out = {
        MADPO: Variant(),
        f"madpo, {CACHED}": Variant(cached=True),
        "madpo without packing": Variant(packing="alone"),
        "madpo without balance": Variant(packing="counted"),
        "madpo without prefix sharing": Variant(("model.prefix_sharing=false",)),
        "madpo without one traversal": Variant(one_traversal=False),
        f"madpo with ZeRO-{other_stage}": Variant((f"deepspeed.zero_optimization.stage={other_stage}",)),
    }
    if ranks == 1:
        del out["madpo without balance"]
    if not lora:
        del out["madpo without one traversal"]
    return out


@dataclass(frozen=True)
class Settings:
    model: str
    data: str
    lora: bool
    ranks: int
    pairs: int  # in a step, over all ranks
    max_length: int
    bf16: bool
    block: int  # steps without a pause
    rounds: int  # that are measured
    warmup: int  # rounds before these
    threads: int  # of all ranks together, on a CPU
    trl_batch_sizes: tuple[int, ...]  # all are tried, the fastest is measured; none: TRL is left out
    variants: Mapping[str, Variant]  # of our trainer
    lr: float
    together: bool  # all contenders run in each round

    @property
    def steps(self) -> int:
        return self.block * (self.rounds + self.warmup)


@dataclass(frozen=True)
class Row:
    """One line of a table: a contender on a workload. None where it was refused or not measured."""

    model: str
    data: str
    lora: bool
    ranks: int
    pairs: int
    dtype: str
    contender: str
    step_seconds: float | None = None
    p25: float | None = None
    p75: float | None = None
    tokens_per_second: float | None = None  # padding-free tokens of both sequences of every pair
    tflops: float | None = None  # per second and rank, as `step_flops` counts them
    mfu: float | None = None  # `tflops` over the GPU's peak; None if that is unknown
    times_first: float | None = None  # median over rounds of the first contender's time over its own
    cpu_times_first: float | None = None  # `times_first` in CPU time, None on a GPU
    peak_mib: float | None = None  # of the rank with the most
    loss: float | None = None  # mean of the last block
    loss_gap: float | None = None  # the largest difference of any block from the first contender's
    refused: str | None = None


def make_settings(
    model: str,
    data: str,
    lora: bool,
    ranks: int,
    pairs: int | None,
    max_length: int,
    dtype: str | None,
    rounds: int | None,
    threads: int | None,
    contenders: Sequence[str],
) -> Settings:
    """Settings from the command line's options, checked. Raises UserError for what is not allowed."""
    on_gpu = torch.cuda.is_available()
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    pairs = pairs or (64 if on_gpu else 8)
    ours = variants(ranks, lora)
    known = [TRL, *ours]
    if unknown := [name for name in contenders if name not in known and "=" not in name]:
        raise UserError(
            f"--contender {unknown[0]}: unknown; choose from {', '.join(known)}, or give keys of our config, "
            "as in model.use_liger_kernel=true"
        )
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"--dtype {dtype}: choose bfloat16 or float32")
    if ranks < 1 or pairs % ranks:
        raise UserError(f"--pairs {pairs}: must be a multiple of --ranks {ranks}, for TRL to share them out")
    if lora:
        require_peft()
    wanted = [name for name in contenders if "=" not in name] or known
    if TRL in contenders and find_spec("trl") is None:
        raise UserError(f"--contender TRL: it is not installed: {install('trl==1.16.0')}")
    sizes = [n for n in range(1, pairs // ranks + 1) if pairs // ranks % n == 0 and n & (n - 1) == 0]
    return Settings(
        model,
        data,
        lora,
        ranks,
        pairs,
        max_length,
        dtype == "bfloat16",
        block=5 if on_gpu else 1,
        rounds=rounds or (4 if on_gpu else 12),
        warmup=1 if on_gpu else 2,
        threads=threads or torch.get_num_threads(),
        trl_batch_sizes=tuple(sizes) if TRL in wanted and find_spec("trl") else (),
        variants={name: variant for name, variant in ours.items() if name in wanted}
        | {
            f"madpo, {keys}": Variant(tuple(keys.split()), may_fail=True)
            for keys in contenders
            if "=" in keys
        },
        # In bf16 large steps of all weights soon part one trainer from another.
        lr=1e-4 if dtype == "float32" or lora else 1e-5,
        together=not on_gpu,
    )


def run(settings: Settings, folder: Path, log: Callable[[str], None]) -> Iterator[list[Row]]:
    """Measure all contenders; yields all rows so far whenever there are more. `folder` takes model and pairs.

    Raises UserError for unknown names.
    """
    log("writing the model and the pairs")
    workload = make_workload(
        folder, settings.model, settings.data, settings.pairs * settings.steps, settings.max_length
    )
    ours = _job(settings, workload)
    jobs = {name: replace(ours, **variant._asdict()) for name, variant in settings.variants.items()}
    refused: dict[str, str] = {}
    jobs = _trl_jobs(settings, ours, log, refused) | jobs
    rounds = dict[str, list[Block]]()
    for names in [list(jobs)] if settings.together or not jobs else [[name] for name in jobs]:
        some = {name: jobs[name] for name in names}
        rounds |= tournament(some, settings.rounds + settings.warmup, log, refused)
        yield list(_rows(settings, workload, jobs, rounds, refused))


def _job(settings: Settings, workload: Workload) -> Job:
    return Job(
        MADPO,
        workload,
        settings.ranks,
        max(1, settings.threads // settings.ranks),
        settings.pairs,
        settings.steps,
        settings.block,
        settings.bf16,
        settings.lr,
        settings.lora,
    )


def _trl_jobs(
    settings: Settings, ours: Job, log: Callable[[str], None], refused: dict[str, str]
) -> dict[str, Job]:
    """TRL's contenders: with its fastest batch size, with that and a cached reference if we have one too, and
    with its default batch size."""
    if not settings.trl_batch_sizes:
        return {}
    best = _best_batch_size(settings, ours, log, refused)
    if best is None:
        return {}
    fastest = replace(ours, trainer=TRL, batch_size=best)
    jobs = {name_of(fastest): fastest}
    if any(variant.cached for variant in settings.variants.values()):
        jobs[f"{name_of(fastest)}, {CACHED}"] = replace(fastest, cached=True)
    default = replace(fastest, batch_size=TRL_DEFAULT)
    if TRL_DEFAULT in settings.trl_batch_sizes and name_of(default) not in {*jobs, *refused}:
        jobs[f"{name_of(default)}, its default"] = default
    return jobs


def name_of(trl: Job) -> str:
    return f"{TRL}, batch size {trl.batch_size}"


def _best_batch_size(
    settings: Settings, ours: Job, log: Callable[[str], None], refused: dict[str, str]
) -> int | None:
    """TRL's fastest batch size; None if all fail."""

    def seconds(*sizes: int) -> list[float]:
        tried = [replace(ours, trainer=TRL, batch_size=size) for size in sizes]
        count = min(TRIAL_ROUNDS, settings.rounds + settings.warmup)
        rounds = tournament({name_of(job): job for job in tried}, count, log, refused)
        blocks_of_each = [rounds.get(name_of(job), []) for job in tried]
        return [min((block.seconds for block in blocks[1:]), default=math.inf) for blocks in blocks_of_each]

    sizes = settings.trl_batch_sizes
    if len(sizes) == 1:
        return sizes[0]
    times = dict(zip(sizes, seconds(*sizes), strict=True)) if settings.together else climb(sizes, seconds)
    best = min(times, key=lambda size: times[size])
    return best if times[best] < math.inf else None


def climb(sizes: Sequence[int], seconds: Callable[[int], Sequence[float]]) -> dict[int, float]:
    """(size -> seconds) from TRL's default upwards while it gets faster, or else downwards. Trying all sizes
    would take longer than the benchmark."""
    start = min(range(len(sizes)), key=lambda i: abs(sizes[i] - TRL_DEFAULT))
    (best,) = seconds(sizes[start])
    times = {sizes[start]: best}
    for way in (sizes[start + 1 :], sizes[:start][::-1]):
        for size in way:
            (times[size],) = seconds(size)
            if times[size] >= best:
                break
            best = times[size]
        if best < times[sizes[start]]:
            break
    return times


def tournament(
    jobs: Mapping[str, Job], rounds: int, log: Callable[[str], None], refused: dict[str, str]
) -> dict[str, list[Block]]:
    """Run all contenders in rounds; returns the blocks of each. One that fails is in `refused` instead."""
    contenders: dict[str, Contender] = {}
    blocks: dict[str, list[Block]] = {}
    order, shuffle = list(jobs), random.Random(0).shuffle

    def attempt(name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except RuntimeError as error:
            no_memory = "OutOfMemoryError" in str(error)
            if jobs[name].trainer == MADPO and not (jobs[name].may_fail or no_memory):
                raise
            order.remove(name)
            contenders.pop(name, None)
            blocks.pop(name, None)
            refused[name] = f"failed: {str(error).strip().splitlines()[-1]}"

    def start(name: str) -> None:
        contenders[name] = Contender.start(jobs[name])

    def turn(name: str) -> None:
        blocks.setdefault(name, []).append(contenders[name].run_block())

    try:
        for name in jobs:
            log(f"starting {name}")
            attempt(name, lambda name=name: start(name))
        for number in range(rounds):
            log(f"round {number + 1} of {rounds}: {', '.join(order)}")
            shuffle(order)
            for name in list(order):
                attempt(name, lambda name=name: turn(name))
    finally:
        for contender in contenders.values():
            contender.stop()
    return {name: blocks[name] for name in jobs if name in blocks}


def _rows(
    settings: Settings,
    workload: Workload,
    jobs: Mapping[str, Job],
    rounds: Mapping[str, list[Block]],
    refused: Mapping[str, str],
) -> Iterator[Row]:
    pairs, size = workload.pairs(), settings.pairs * settings.block
    starts = range(0, len(pairs), size)
    tokens = [sum(map(real_tokens, pairs[i : i + size])) for i in starts]
    flops = {cached: step_flops(workload, settings.lora, cached) for cached in (False, True)}
    first = next(iter(rounds.values()), [])
    peak = peak_flops(None, this_device(), settings.bf16)
    dtype = "bfloat16" if settings.bf16 else "float32"
    where = settings.model, settings.data, settings.lora, settings.ranks, settings.pairs, dtype
    for name, blocks in rounds.items():
        gap = max(abs(ours.loss - theirs.loss) for ours, theirs in zip(blocks, first, strict=True))
        row = Row(*where, name, loss=blocks[-1].loss, loss_gap=gap)
        if not gap <= LOSS_TOLERANCE[settings.bf16]:
            yield replace(row, refused=f"wrong: its loss is off by {gap:.1e}")
            continue
        measured = range(settings.warmup, len(blocks))
        times = [blocks[i].seconds for i in measured]
        work = [flops[jobs[name].cached][i : i + size].sum() / settings.ranks for i in starts]
        rate = statistics.median(work[i] / blocks[i].seconds for i in measured)
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        yield replace(
            row,
            step_seconds=statistics.median(times) / settings.block,
            p25=quarters[0] / settings.block,
            p75=quarters[2] / settings.block,
            tokens_per_second=statistics.median(tokens[i] / blocks[i].seconds for i in measured),
            tflops=rate / 1e12,
            mfu=None if peak is None else rate / peak,
            times_first=statistics.median(first[i].seconds / blocks[i].seconds for i in measured),
            cpu_times_first=None
            if torch.cuda.is_available()
            else statistics.median(first[i].cpu_seconds / blocks[i].cpu_seconds for i in measured),
            peak_mib=max(block.peak_bytes for block in blocks) / 2**20,
        )
    for name, reason in refused.items():
        yield Row(*where, name, refused=reason)
