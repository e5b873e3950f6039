"""A whole training step against TRL's, and against ourselves with a feature off. `madpo bench step` runs it.

Every contender trains the same model on the same pairs in the same order, in processes of its own, one
block of steps at a time. On a CPU all have their turn in every round, in a new order: a busy machine slows
all of them. On a GPU each would need the memory of the others, and comes to its end before the next. What a
contender is worth is the median over rounds of the first one's time, TRL's, over its own. A contender whose
losses are not those of the first one has no speed.
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
from madpo.trainer.throughput import peak_flops

TRL, MADPO = "TRL", "madpo"
CACHED = "reference cached"
TRL_DEFAULT = 8
"""Its per_device_train_batch_size where none is given."""
TRIAL_ROUNDS = 3
LOSS_TOLERANCE = {False: 1e-4, True: 2e-2}
"""Whether in bf16 -> the largest difference of a block's mean loss that rounding explains. In bf16 a few
steps hardly move the loss by more: that the work is equal is shown in float32."""


class Variant(NamedTuple):
    """How a contender of ours differs from the defaults."""

    overrides: tuple[str, ...] = ()  # of our config
    packing: Packing = "balanced"
    one_traversal: bool = True
    cached: bool = False  # the reference is scored before
    may_fail: bool = False


def variants(ranks: int, lora: bool) -> dict[str, Variant]:
    """Ours, and ours with one thing changed, to see what it is worth."""
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
    pairs: int  # of a step, over all ranks
    max_length: int
    bf16: bool
    block: int  # steps in a turn
    rounds: int  # measured
    warmup: int  # rounds before
    threads: int  # of all ranks together, on a CPU
    trl_batch_sizes: tuple[int, ...]  # tried, the best is measured; none: TRL is left out
    variants: Mapping[str, Variant]  # of ours
    lr: float
    together: bool  # all in each round

    @property
    def steps(self) -> int:
        return self.block * (self.rounds + self.warmup)


@dataclass(frozen=True)
class Row:
    """One contender; None where it was refused."""

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
    tflops: float | None = None  # of a rank, those that the mathematics asks for: see `step_flops`
    mfu: float | None = None  # of what is known of the GPU
    times_first: float | None = None  # median over rounds of the first contender's time over its own
    cpu_times_first: float | None = None  # the same in CPU time, None on a GPU
    peak_mib: float | None = None  # the largest rank's
    loss: float | None = None  # of the last block
    loss_gap: float | None = None  # the largest difference of any block from the first contender's
    refused: str | None = None


def settings(
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
    """Complete and check what the command line gave. Raises UserError."""
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
        raise UserError("--contender TRL: it is not installed: pip install trl==1.16.0")
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


def run(what: Settings, folder: Path, log: Callable[[str], None]) -> Iterator[list[Row]]:
    """The rows of all contenders so far, as often as there are more. `folder` takes the model and the pairs.

    Raises UserError for unknown names.
    """
    log("writing the model and the pairs")
    workload = make_workload(folder, what.model, what.data, what.pairs * what.steps, what.max_length)
    ours = _job(what, workload)
    jobs = {name: replace(ours, **variant._asdict()) for name, variant in what.variants.items()}
    refused: dict[str, str] = {}
    jobs = _trl_jobs(what, ours, log, refused) | jobs
    rounds = dict[str, list[Block]]()
    for names in [list(jobs)] if what.together or not jobs else [[name] for name in jobs]:
        some = {name: jobs[name] for name in names}
        rounds |= tournament(some, what.rounds + what.warmup, log, refused)
        yield list(_rows(what, workload, jobs, rounds, refused))


def _job(what: Settings, workload: Workload) -> Job:
    return Job(
        MADPO,
        workload,
        what.ranks,
        max(1, what.threads // what.ranks),
        what.pairs,
        what.steps,
        what.block,
        what.bf16,
        what.lr,
        what.lora,
    )


def _trl_jobs(
    what: Settings, ours: Job, log: Callable[[str], None], refused: dict[str, str]
) -> dict[str, Job]:
    """TRL with its fastest micro-batch, the first contender; the same with a cached reference, if ours is
    measured with one; and as it comes."""
    if not what.trl_batch_sizes:
        return {}
    best = _best_batch_size(what, ours, log, refused)
    if best is None:
        return {}
    fastest = replace(ours, trainer=TRL, batch_size=best)
    jobs = {name_of(fastest): fastest}
    if any(variant.cached for variant in what.variants.values()):
        jobs[f"{name_of(fastest)}, {CACHED}"] = replace(fastest, cached=True)
    default = replace(fastest, batch_size=TRL_DEFAULT)
    if TRL_DEFAULT in what.trl_batch_sizes and name_of(default) not in {*jobs, *refused}:
        jobs[f"{name_of(default)}, its default"] = default
    return jobs


def name_of(trl: Job) -> str:
    return f"{TRL}, batch size {trl.batch_size}"


def _best_batch_size(
    what: Settings, ours: Job, log: Callable[[str], None], refused: dict[str, str]
) -> int | None:
    """TRL's fastest micro-batch; None if it runs with none."""

    def seconds(*sizes: int) -> list[float]:
        tried = [replace(ours, trainer=TRL, batch_size=size) for size in sizes]
        count = min(TRIAL_ROUNDS, what.rounds + what.warmup)
        rounds = tournament({name_of(job): job for job in tried}, count, log, refused)
        blocks = [rounds.get(name_of(job), []) for job in tried]
        return [min((block.seconds for block in of_one[1:]), default=math.inf) for of_one in blocks]

    sizes = what.trl_batch_sizes
    if len(sizes) == 1:
        return sizes[0]
    times = dict(zip(sizes, seconds(*sizes), strict=True)) if what.together else climb(sizes, seconds)
    best = min(times, key=lambda size: times[size])
    return best if times[best] < math.inf else None


def climb(sizes: Sequence[int], seconds: Callable[[int], Sequence[float]]) -> dict[int, float]:
    """size -> time, from TRL's default on for as long as the next one up, or else down, is faster: trying
    all would take longer than what is to be measured."""
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
    """The blocks of each contender, in rounds. One that fails is in `refused` instead."""
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
    what: Settings,
    workload: Workload,
    jobs: Mapping[str, Job],
    rounds: Mapping[str, list[Block]],
    refused: Mapping[str, str],
) -> Iterator[Row]:
    pairs, size = workload.pairs(), what.pairs * what.block
    starts = range(0, len(pairs), size)
    tokens = [sum(map(real_tokens, pairs[i : i + size])) for i in starts]
    flops = {cached: step_flops(workload, what.lora, cached) for cached in (False, True)}
    first = next(iter(rounds.values()), [])
    peak = peak_flops(None, this_device(), what.bf16)
    dtype = "bfloat16" if what.bf16 else "float32"
    where = what.model, what.data, what.lora, what.ranks, what.pairs, dtype
    for name, blocks in rounds.items():
        gap = max(abs(ours.loss - theirs.loss) for ours, theirs in zip(blocks, first, strict=True))
        row = Row(*where, name, loss=blocks[-1].loss, loss_gap=gap)
        if not gap <= LOSS_TOLERANCE[what.bf16]:
            yield replace(row, refused=f"wrong: its loss is off by {gap:.1e}")
            continue
        measured = range(what.warmup, len(blocks))
        times = [blocks[i].seconds for i in measured]
        work = [flops[jobs[name].cached][i : i + size].sum() / what.ranks for i in starts]
        rate = statistics.median(work[i] / blocks[i].seconds for i in measured)
        quarters = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
        yield replace(
            row,
            step_seconds=statistics.median(times) / what.block,
            p25=quarters[0] / what.block,
            p75=quarters[2] / what.block,
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
