"""Tests that need a GPU: real vocabularies, offsets beyond 2^31, memory, and no wait for the device."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from kernel_cases import CASES, DEVICE, Case, make_inputs, relative_error, run
from patience import patient

from madpo.benchmarks.head.peers import PEERS, clear
from madpo.benchmarks.head.problems import SHAPES, Problem, exact, make_problem
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import GroupLayout
from madpo.kernels.preference_loss import PreferenceLoss, Reference, preference_loss
from madpo.kernels.preference_loss_from_logits import preference_loss_from_logits
from madpo.kernels.token_logps import linear_token_logps, token_logps

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: make test-gpu")

GIB = 2**30


def head(problem: Problem, **options) -> PreferenceLoss:
    loss = EdgeLoss(problem.beta, margins=problem.margins, margin_weight=problem.margin_weight)
    return preference_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        GroupLayout.pairs(problem.lengths, DEVICE),
        loss,
        Reference(problem.ref_hidden, problem.ref_weight),
        scale=1 / len(problem.margins),
        **options,
    )


@pytest.mark.parametrize("budget", [2 * GIB, GIB // 8], ids=["chunks", "vocab_blocks"])
@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_real_vocabularies_against_float64(shape, budget):
    problem = make_problem(shape, 2048, torch.bfloat16, DEVICE, seed=1)
    truth = exact(problem)
    (naive,) = (peer for peer in PEERS if peer.name == "torch naive fp32")
    state = naive.prepare(problem)
    naive.run(state).backward()
    theirs = [relative_error(got, want) for got, want in zip(state.gradients(), truth[3:], strict=True)]
    clear(state)

    out = head(problem, budget_bytes=budget)
    out.loss.backward()
    per_512 = 512 / torch.tensor(problem.lengths, device=DEVICE).clamp(min=512)
    assert float(((out.logps - truth.logps).abs() * per_512).max()) < 1e-3
    assert relative_error(out.loss, truth.loss) < 1e-4
    for got, want, error in zip((problem.hidden.grad, problem.weight.grad), truth[3:], theirs, strict=True):
        assert relative_error(got, want) <= 3 * error


@pytest.mark.parametrize("budget", [2 * GIB, GIB // 8], ids=["chunks", "vocab_blocks"])
def test_two_runs_agree_bit_for_bit_at_full_size(budget):
    problem = make_problem(SHAPES[3], 8192, torch.bfloat16, DEVICE, seed=2)
    runs = []
    for _ in range(2):
        problem.hidden.grad = problem.weight.grad = None
        out = head(problem, budget_bytes=budget)
        out.loss.backward()
        runs.append((out.loss, out.token_logps, problem.hidden.grad, problem.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_logits_beyond_two_to_the_31():
    """The last rows lie where a 32-bit offset would have wrapped around."""
    rows, vocab = 9000, 256_000
    assert rows * vocab > 2**31
    logits = torch.randn(rows, vocab, dtype=torch.bfloat16, device=DEVICE)
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    last = slice(-3, None)
    kept = logits[last].double().requires_grad_()
    want = kept.log_softmax(-1).gather(1, targets[last, None])[:, 0]
    want.sum().backward()
    out = token_logps(logits.requires_grad_(), targets, inplace_backward=True)
    out.token_logps.sum().backward()
    assert relative_error(out.token_logps[last], want) < 1e-6
    assert logits.grad is not None and relative_error(logits.grad[last], kept.grad) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_wave_beyond_two_to_the_31(dtype):
    lengths, vocab = (4500, 4500), 256_000
    inputs = make_inputs(dtype, lengths, hidden_size=64, vocab_size=vocab)
    out = run(inputs, Case(EdgeLoss(beta=1e-4), budget_bytes=40 * GIB), "triton")
    blocks = run(inputs, Case(EdgeLoss(beta=1e-4), budget_bytes=GIB), "triton")
    last = slice(-3, None)
    logits = inputs.hidden[last].double() @ inputs.weight.double().T
    want = logits.log_softmax(-1).gather(1, inputs.targets[last, None])[:, 0]
    assert relative_error(out["token_logps"][last], want) < 1e-6
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(out["d_hidden"], blocks["d_hidden"]) < tolerance
    assert relative_error(out["d_weight"], blocks["d_weight"]) < tolerance


@contextmanager
def no_waiting() -> Iterator[None]:
    """torch raises where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["dpo", "madpo", "everything", "two_chunks", "vocab_blocks"])
def test_the_head_never_waits_for_the_device(name):
    case = CASES[name]
    inputs = make_inputs(torch.bfloat16, bias=case.bias)
    run(inputs, case, "triton")  # compiles
    groups = GroupLayout.pairs(inputs.groups.lengths, DEVICE)
    inputs = type(inputs)(**{**vars(inputs), "groups": groups})
    with no_waiting():
        run(inputs, case, "triton")


def test_the_other_ops_never_wait_for_the_device():
    inputs = make_inputs(torch.bfloat16)
    logits = (inputs.hidden @ inputs.weight.T).detach()

    def ops() -> None:
        groups = GroupLayout.pairs(inputs.groups.lengths, DEVICE)
        leaf = logits.clone().requires_grad_()
        loss = CASES["madpo"].loss
        preference_loss_from_logits(leaf, inputs.targets, groups, loss, ref_logits=logits).loss.backward()
        token_logps(logits.clone().requires_grad_(), inputs.targets).token_logps.sum().backward()
        hidden, weight = inputs.hidden.requires_grad_(), inputs.weight.requires_grad_()
        linear_token_logps(hidden, weight, inputs.targets).token_logps.sum().backward()
        objective = lambda logps, ref, group_range: (logps - ref).square().sum()  # noqa: E731
        preference_loss(hidden, weight, inputs.targets, groups, objective, inputs.reference).loss.backward()

    ops()  # compiles
    with no_waiting():
        ops()


@pytest.mark.parametrize("budget", [GIB, GIB // 8], ids=["chunks", "vocab_blocks"])
def test_memory_is_that_of_the_formula(budget):
    """Logits up to the budget, float32 dW if there are several chunks, float32 dH of a chunk, gradients."""
    problem = make_problem(SHAPES[3], 8192, torch.bfloat16, DEVICE, seed=3)
    rows, width, vocab = *problem.hidden.shape, len(problem.weight)
    head(problem, budget_bytes=budget).loss.backward()  # compiles
    problem.hidden.grad = problem.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head(problem, budget_bytes=budget).loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = 2 * rows * width + 2 * vocab * width
    formula = budget + 4 * vocab * width + 4 * rows * width + gradients
    assert peak <= 1.05 * formula + 32 * 2**20


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_the_sanitizer_finds_nothing(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    # initcheck counts reads of unwritten memory in cuBLAS and torch too: only our kernels.
    only = ["--kernel-name", "kns=_kernel"] if tool == "initcheck" else []
    done = subprocess.run(
        [sanitizer, "--tool", tool, *only, "--error-exitcode", "86", sys.executable, __file__],
        capture_output=True,
        text=True,
        timeout=patient(280),
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device here")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout[-3000:]


def small_ops() -> None:
    """Every kernel once, for the sanitizer."""
    for name in ("madpo", "everything", "two_chunks", "vocab_blocks"):
        run(make_inputs(torch.bfloat16, bias=CASES[name].bias), CASES[name], "triton")
    logits = torch.randn(63, 5003, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 5003, (63,), device=DEVICE)
    groups = GroupLayout.pairs((3, 5, 9, 1, 0, 4, 20, 21), DEVICE)
    token_logps(logits, targets, entropy=True).token_logps.sum().backward()
    preference_loss_from_logits(logits, targets, groups, CASES["madpo"].loss).loss.backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    small_ops()


def test_a_target_outside_the_vocabulary_fails_an_assertion_on_the_device():
    code = (
        "import torch\n"
        "from madpo.kernels.token_logps import token_logps\n"
        "token_logps(torch.zeros(2, 16, device='cuda'), torch.tensor([3, -100], device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode != 0 and "No label is ignored" in done.stderr
