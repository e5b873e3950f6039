"""The loss head against its peers: correct first, then fast. `madpo bench` runs it.

`python -m madpo.benchmarks.head` does the same with the same options, and needs only torch, Triton and
numpy.

For every problem it forms the exact answer in float64, then each head's errors against it. Heads that are
right are timed, interleaved with each other and with the bare GEMMs of the same shapes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from madpo.benchmarks.head import measure
from madpo.benchmarks.head import report as head_report
from madpo.benchmarks.head.measure import LIMIT, Row
from madpo.benchmarks.head.ours import OURS, gemm_chain, useful_flops
from madpo.benchmarks.head.peers import PEERS, Peer, available, clear
from madpo.benchmarks.head.problems import SHAPES, SMALL, Exact, Problem, Shape, exact, make_problem
from madpo.benchmarks.head.time import seconds_of
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import GroupLayout
from madpo.kernels.naive import preference_loss_from_logps_ref, token_logps_ref
from madpo.kernels.preference_loss_from_logits import preference_loss_from_logits
from madpo.trainer.errors import UserError

ROWS, SMALL_ROWS = (512, 2048, 8192), (512,)
VARIANTS = ("frozen_head", "saturated")
IN_ONE_SITTING = ("Llama-3.1-8B", "Gemma-2-9B", "Llama-3.2-1B", "Qwen2.5-0.5B"), (8192,)
"""Shapes and numbers of tokens for a GPU where none are named: under ten minutes, see `minutes`."""
OUTPUT = Path("benchmarks/results")
TOLERATED = 5.0
"""A head that errs more than this many times as much as naive torch is not timed."""
FLOORS = {"loss": 1e-3, "d_hidden": 1e-4, "d_weight": 1e-4}
BASELINE = "torch naive fp32"
HEADS = (*OURS, *PEERS)


@dataclass(frozen=True)
class Settings:
    shapes: tuple[Shape, ...]
    rows: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    heads: tuple[str, ...]  # names, or their beginnings; none: all
    iterations: int
    warmup: int = 5
    variants: tuple[str, ...] = VARIANTS  # of the largest problem of each shape
    logits: bool = True  # whether the op over existing logits is measured too
    left_out: tuple[str, ...] = ()  # left out by default, not by an option

    def wants(self, name: str) -> bool:
        return not self.heads or name.startswith(self.heads) or name == BASELINE


def make_settings(
    shapes: Sequence[str],
    rows: Sequence[int],
    heads: Sequence[str],
    dtype: str,
    iterations: int | None,
    everything: bool = False,
    variants: bool = True,
    device: torch.device | None = None,
) -> Settings:
    """Settings from the command line's options, checked. Raises UserError for unknown names.

    On a GPU, options that are not given mean everything with `everything`, else what fits ten minutes.
    """
    known = {shape.name: shape for shape in (*SHAPES, *SMALL)}
    if unknown := [name for name in shapes if name not in known]:
        raise UserError(f"--shape {unknown[0]}: unknown; choose from {', '.join(known)}")
    names = [head.name for head in HEADS]
    if unknown := [name for name in heads if not any(n.startswith(name) for n in names)]:
        raise UserError(f"--head {unknown[0]}: unknown; choose from {', '.join(names)}")
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"--dtype {dtype}: choose bfloat16 or float32")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    all_shapes, all_rows = (SHAPES, ROWS) if on_gpu else (SMALL, SMALL_ROWS)
    some_shapes, some_rows = tuple(shape.name for shape in all_shapes), all_rows
    some_variants = VARIANTS if variants else ()
    left_out: list[str] = []
    if on_gpu and not everything:
        some_shapes, some_rows = IN_ONE_SITTING
        if not shapes:
            left_out += [shape.name for shape in all_shapes if shape.name not in some_shapes]
            left_out += [variant.replace("_", " ") for variant in some_variants]
            some_variants = ()
        if not rows:
            left_out += [f"{count} rows" for count in all_rows if count not in some_rows]
    return Settings(
        tuple(known[name] for name in shapes or some_shapes),
        tuple(rows) or some_rows,
        getattr(torch, dtype),
        device,
        tuple(heads),
        iterations or (20 if on_gpu else 3),
        variants=some_variants,
        logits=variants,
        left_out=tuple(left_out),
    )


def minutes(settings: Settings, heads: Sequence[str]) -> float:
    """Minutes on an H200, roughly, with these heads."""
    wanted = [name for name in (LIMIT, *heads) if name == LIMIT or settings.wants(name)]
    rounds = settings.warmup + settings.iterations
    problems = [(shape, rows) for shape in settings.shapes for rows in settings.rows]
    problems += [(shape, settings.rows[-1]) for shape in settings.shapes for _ in settings.variants]
    return sum(seconds_of(shape, rows, rounds, wanted) for shape, rows in problems) / 60


def notes(settings: Settings, versions: Mapping[str, str], absent: Mapping[str, str]) -> Iterator[str]:
    """Lines that say what is not measured, and how long the rest will take."""
    yield from (f"without {name}: {reason}" for name, reason in absent.items() if settings.wants(name))
    if settings.left_out:
        yield f"left out: {', '.join(settings.left_out)}; --all takes all, --shape and --rows what they name"
    if settings.device.type == "cuda":
        here = [*(head.name for head in OURS), *versions]
        yield f"about {minutes(settings, here):.0f} minutes on an H200, by the FLOPs of the shapes"


def run(settings: Settings, log: Callable[[str], None]) -> Iterator[Row]:
    """Measure all problems; yields each row of the results when it is known."""
    for shape in settings.shapes:
        for rows in settings.rows:
            log(f"{shape.name}, {rows} rows")
            problem = make_problem(shape, rows, settings.dtype, settings.device, seed=rows)
            yield from measured(problem, shape, "plain", settings)
            del problem
        rows = settings.rows[-1]
        for variant in settings.variants:
            log(f"{shape.name}, {rows} rows, {variant}")
            problem = make_problem(shape, rows, settings.dtype, settings.device, seed=rows, **{variant: True})
            yield from measured(problem, shape, variant.replace("_", " "), settings)
            del problem
        if settings.logits:
            log(f"{shape.name}, {rows} rows, from logits")
            yield from from_logits(shape, rows, settings)


def record(
    settings: Settings, command: str, output: Path, absent: dict[str, str], log: Callable[[str], None]
) -> tuple[dict[str, Any], list[Path]]:
    """Measure, and write the files anew after every problem; returns this run's results and the files."""
    facts = head_report.facts(command, settings.device)
    measured_so_far, paths = list[Row](), list[Path]()
    rows = run(settings, log)
    for _, of_problem in groupby(rows, key=lambda row: (row.shape, row.rows, row.variant)):
        measured_so_far += of_problem
        paths = head_report.write(output, facts, measured_so_far, absent)
    return head_report.together([], facts, measured_so_far, absent), paths


def measured(problem: Problem, shape: Shape, variant: str, settings: Settings) -> Iterator[Row]:
    """Check every head on the problem, then time those that are right."""
    torch.compiler.reset()
    versions, _ = available()
    facts: dict[str, dict[str, Any]] = {}
    states: dict[str, Any] = {}
    heads = {head.name: head for head in HEADS if settings.wants(head.name)}
    truths = {True: exact(problem)}
    for name, head in heads.items():
        if head.module is not None and name not in versions:
            continue
        reason = head.refuses(problem)
        if reason is None:
            if head.weighted not in truths:
                truths[head.weighted] = exact(problem.unweighted())
            try:
                states[name], facts[name] = _check(head, problem, truths[head.weighted])
            except torch.cuda.OutOfMemoryError:
                reason = "out of memory"
            except Exception as error:
                if head in OURS:
                    raise
                reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
        if reason is not None:
            facts[name] = {"refused": reason}
    _check_facts(facts)
    for name in facts:
        if facts[name].get("refused"):
            states.pop(name, None)
    calls: dict[str, Callable[[], None]] = {LIMIT: lambda: gemm_chain(problem)}
    calls |= {name: _step(heads[name], state) for name, state in states.items()}

    def after() -> None:
        for state in states.values():
            clear(state)

    times = measure.interleaved(calls, settings.device, settings.iterations, settings.warmup, after)
    facts[LIMIT] = {}
    where = shape.name, len(problem.hidden), str(problem.hidden.dtype).removeprefix("torch."), variant
    for name, fact in facts.items():
        if (timing := times.get(name)) is not None:
            fact |= vars(timing) | {
                "tflops": useful_flops(problem) / timing.median / 1e9,
                "share_of_limit": times[LIMIT].median / timing.median,
            }
            fact["ms"] = fact.pop("median")
        yield Row(*where, name, **fact)


def _step(head: Peer, state: Any) -> Callable[[], None]:
    def step() -> None:
        head.run(state).backward()

    return step


def _check(head: Peer, problem: Problem, truth: Exact) -> tuple[Any, dict[str, Any]]:
    """Run one step: the head's state, and its errors and working memory."""
    state = head.prepare(problem)
    step = _step(head, state)
    step()  # compiles
    clear(state)
    peak = measure.peak_bytes(step, problem.hidden.device)
    d_hidden, d_weight = state.gradients()
    size = sum(g.nbytes for g in (state.hidden.grad, problem.weight.grad) if g is not None)
    facts: dict[str, Any] = {
        "working_mib": None if peak is None else (peak - size) / 2**20,
        "d_hidden_error": _relative(d_hidden, truth.d_hidden),
        "d_weight_error": None if truth.d_weight is None else _relative(d_weight, truth.d_weight),
    }
    clear(state)
    facts["loss_error"] = float((head.run(state).detach().double() - truth.loss).abs())
    if head.logps is not None:
        facts["logp_error"] = float((head.logps(state).double() - truth.logps).abs().max())
    return state, facts


def _relative(got: Any, want: Tensor) -> float:
    """Norm of the difference over that of the truth; the norm itself where the truth is 0."""
    scale = want.norm()
    return float((got.double() - want).norm() / (scale if scale > 1e-30 else 1.0))


def _check_facts(facts: dict[str, dict[str, Any]]) -> None:
    base = facts.get(BASELINE, {})
    for fact in facts.values():
        for key, floor in FLOORS.items():
            error, theirs = fact.get(f"{key}_error"), base.get(f"{key}_error") or 0.0
            if error is not None and not error <= TOLERATED * theirs + floor:
                fact["refused"] = f"wrong: {key} is off by {error:.1e}, naive torch by {theirs:.1e}"
                break


def from_logits(shape: Shape, rows: int, settings: Settings) -> Iterator[Row]:
    """Measure the op over existing logits, as the bytes it has to move over its time."""
    problem = make_problem(shape, rows, settings.dtype, settings.device, seed=rows)
    groups = GroupLayout.pairs(problem.lengths, settings.device)
    loss = EdgeLoss(problem.beta, margins=problem.margins, margin_weight=problem.margin_weight)
    with torch.no_grad():
        original, reference = problem.hidden @ problem.weight.t(), problem.ref_hidden @ problem.ref_weight.t()
    logits = original.clone().requires_grad_()

    def ours() -> Tensor:
        return preference_loss_from_logits(logits, problem.targets, groups, loss, ref_logits=reference).loss

    def naive() -> Tensor:
        with torch.no_grad():
            ref_logps = token_logps_ref(reference, problem.targets)
        return preference_loss_from_logps_ref(
            token_logps_ref(logits, problem.targets), ref_logps, groups, loss
        )

    def restore() -> None:
        """Put the logits back: our backward overwrote them with their gradient."""
        logits.grad = None
        logits.detach().copy_(original)

    calls: dict[str, Callable[[], None]] = {}
    refused: dict[str, str] = {}
    answers = {}
    for name, op in (("torch naive", naive), ("madpo", ours)):
        value = op()
        value.backward()
        assert logits.grad is not None
        answers[name] = value.detach(), logits.grad.clone()
        restore()
        calls[f"{name}, forward"] = lambda op=op: measure.discard(op())
        calls[f"{name}, forward + backward"] = lambda op=op: op().backward()
    (want, d_want), (got, d_got) = answers.values()
    errors = float((got - want).abs() / want.abs()), _relative(d_got, d_want.double())
    if not (errors[0] < 1e-4 and errors[1] < 0.02):
        refused["madpo"] = f"wrong: loss and gradient differ from naive torch's by {errors}"
        calls = {name: call for name, call in calls.items() if not name.startswith("madpo")}
    bandwidth = measure.copy_bandwidth(settings.device, settings.iterations)
    times = measure.interleaved(calls, settings.device, settings.iterations, settings.warmup, restore)
    where = shape.name, rows, str(settings.dtype).removeprefix("torch."), "from logits"
    for name, timing in times.items():
        moved = original.nbytes * (4 if "backward" in name else 2)
        rate = moved / (timing.median / 1000)
        yield Row(
            *where,
            name,
            timing.median,
            timing.p20,
            timing.p80,
            share_of_limit=rate / bandwidth,
            gb_per_s=rate / 1e9,
        )
    for name, reason in refused.items():
        yield Row(*where, name, refused=reason)


def main() -> int:
    """Run the benchmark without the rest of the package, in plain text; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m madpo.benchmarks.head", description=(__doc__ or "").split(". ")[0] + "."
    )
    repeated: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--shape", **repeated, help="as in Llama-3.1-8B")
    parser.add_argument("--rows", **repeated, type=int, help="completion tokens, as in 512, 2048, 8192")
    parser.add_argument("--head", **repeated, help="as in madpo or TRL; default: all")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32")
    parser.add_argument("--iterations", type=int, help="default: 20")
    parser.add_argument("--all", action="store_true", help="every shape, size and variant, not ten minutes'")
    parser.add_argument("--no-variants", action="store_true", help="no frozen head, saturation, given logits")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the results")
    given = parser.parse_args()
    try:
        settings = make_settings(
            given.shape,
            given.rows,
            given.head,
            given.dtype,
            given.iterations,
            given.all,
            not given.no_variants,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    versions, absent = available()

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    for note in notes(settings, versions, absent):
        log(note)
    command = shlex.join(["python", "-m", "madpo.benchmarks.head", *sys.argv[1:]])
    results, paths = record(settings, command, given.output, absent, log)
    print("\n".join(head_report.as_lines(results)))
    for path in paths:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
