"""The head's benchmark: its exact answer, its refusal of wrong results, and its files."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from commands import command
from kernel_cases import relative_error
from patience import patient

from madpo.benchmarks.head import measure
from madpo.benchmarks.head import run as head
from madpo.benchmarks.head.measure import LIMIT
from madpo.benchmarks.head.ours import OURS, useful_flops
from madpo.benchmarks.head.peers import PEERS, Peer, available
from madpo.benchmarks.head.problems import SMALL, describe, exact, make_problem
from madpo.benchmarks.head.tune import sweep
from madpo.kernels import logit_rows as rows
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import GroupLayout
from madpo.kernels.naive import preference_loss_ref
from madpo.kernels.preference_loss import Reference

CPU = torch.device("cpu")


def problem(dtype=torch.float32, rows=90, **kwargs):
    return make_problem(SMALL[0], rows, dtype, "cpu", seed=0, **kwargs)


def test_problems_are_whole_pairs_and_peaked():
    small = problem(rows=600)
    assert sum(small.lengths) == 600 and len(small.lengths) == 2 * len(small.margins)
    assert len(set(small.lengths)) > 1
    found = describe(small)
    assert 1 < found.entropy < 4 and found.between > 0.8
    again = problem(rows=600)
    assert torch.equal(small.hidden, again.hidden) and torch.equal(small.targets, again.targets)


@pytest.mark.parametrize("kind", ["weighted", "unweighted", "frozen_head"])
def test_the_closed_form_equals_autograd_in_float64(kind):
    small = problem(frozen_head=kind == "frozen_head")
    small = small.unweighted() if kind == "unweighted" else small
    hidden, weight = (x.detach().double().requires_grad_() for x in (small.hidden, small.weight))
    loss = EdgeLoss(small.beta, margins=small.margins, margin_weight=small.margin_weight)
    reference = Reference(small.ref_hidden.double(), small.ref_weight.double())
    groups = GroupLayout.pairs(small.lengths, "cpu")
    want, _, _ = preference_loss_ref(
        hidden, weight, small.targets, groups, loss, reference, scale=1 / len(small.margins)
    )
    want.backward()
    truth = exact(small)
    assert float(truth.loss) == pytest.approx(float(want.detach()), rel=1e-12)
    assert relative_error(truth.d_hidden, hidden.grad) < 1e-12
    if kind == "frozen_head":
        assert truth.d_weight is None
    else:
        assert relative_error(truth.d_weight, weight.grad) < 1e-12


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param(peer, id=peer.name, marks=[pytest.mark.slow] if peer.module else [])
        for peer in (*OURS, *PEERS)
    ],
)
def test_every_head_here_computes_the_same_loss(peer: Peer):
    reason = available()[1].get(peer.name) or peer.refuses(problem())
    if reason or "compile" in peer.name:
        pytest.skip(reason or "compiles for long; `madpo bench` checks it")
    state = peer.prepare(problem())
    truth = exact(state.problem)
    loss = peer.run(state)
    (0.5 * loss).backward()
    tolerance = 5e-6
    assert relative_error(loss, truth.loss) < tolerance
    for got, want in zip(state.gradients(), (truth.d_hidden, truth.d_weight), strict=True):
        assert got is not None and relative_error(2 * got, want) < tolerance
    if peer.logps is not None:
        assert relative_error(peer.logps(state), truth.logps) < 1e-6


def test_a_wrong_head_has_no_speed(monkeypatch):
    """A head whose gradient is a hundredth too large is named, and not timed."""

    def run(state):
        loss = OURS[0].run(state)
        return loss + 0.05 * (loss - loss.detach())

    wrong = replace(OURS[0], name="wrong", run=run)
    monkeypatch.setattr(head, "HEADS", (*head.HEADS, wrong))
    what = replace(
        head.make_settings(["small-1003"], [64], ["madpo"], "float32", 1), heads=("madpo", "wrong")
    )
    rows = {row.head: row for row in head.measured(problem(rows=64), SMALL[0], "plain", what)}
    assert rows["wrong"].ms is None and "wrong: d_hidden is off by" in (rows["wrong"].refused or "")
    assert rows["madpo"].ms and rows["madpo"].refused is None
    assert rows[LIMIT].share_of_limit == 1.0


def test_interleaved_times_what_it_is_given():
    calls: list[str] = []
    after: list[int] = []
    timings = measure.interleaved(
        {name: lambda name=name: calls.append(name) for name in "ab"}, CPU, 4, 2, lambda: after.append(1)
    )
    assert sorted(calls) == ["a"] * 6 + ["b"] * 6 and len(after) == 12
    assert all(t.p20 <= t.median <= t.p80 for t in timings.values())


def test_useful_work_counts_what_has_to_be_done():
    rows, width, vocab = 90, SMALL[0].hidden, SMALL[0].vocab
    assert useful_flops(problem()) == 8 * rows * width * vocab
    assert useful_flops(problem(frozen_head=True)) == 6 * rows * width * vocab


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "madpo.launch.cli", "bench", *args]
    return subprocess.run(line, capture_output=True, text=True, timeout=patient(200), check=False)


@pytest.mark.slow
def test_the_command_writes_a_table_a_file_and_a_plot_and_adds_to_them(tmp_path):
    options = ("--shape", "small-1003", "--iterations", "2", "--output", str(tmp_path))
    done = bench(*options, "--rows", "64", "--head", "madpo")
    assert done.returncode == 0, done.stderr
    assert "the times mean nothing" in done.stdout and "small-1003, 64 rows" in done.stdout
    (path,) = tmp_path.glob("head_cpu_*.json")
    assert path.with_suffix(".svg").read_text().count("<svg") == 1
    found = json.loads(path.read_text())
    assert {row["variant"] for row in found["rows"]} == {"plain", "frozen head", "saturated", "from logits"}
    assert {row["head"] for row in found["rows"]} > {"madpo", "torch naive fp32", "GEMMs alone"}
    assert found["hardware"] == "CPU" and "torch" in found["versions"]
    assert "means nothing" in path.with_suffix(".svg").read_text()

    assert bench(*options, "--rows", "48", "--head", "torch naive").returncode == 0
    more = json.loads(path.read_text())
    assert [row for row in more["rows"] if row["rows"] == 64] == found["rows"]
    text = path.with_suffix(".md").read_text()
    assert "the times mean nothing" in text and "## small-1003, 48 rows, bfloat16, plain" in text


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [("--shape", "GPT-5", "Llama-3.1-8B"), ("--head", "Axolotl", "Liger"), ("--dtype", "fp8", "bfloat16")],
)
def test_unknown_names_are_one_line(option, value, named, tmp_path):
    status, _, said = command("bench", option, value, "--output", str(tmp_path))
    assert status == 2
    assert said.startswith(f"error: {option} {value}") and named in said
    assert len(said.strip().splitlines()) == 1


def test_tuning_tries_every_choice_and_leaves_the_kernels_as_they_were():
    before = rows.BLOCK, rows.NUM_WARPS
    found = list(sweep(2, (300,), CPU, 1, ((64, 4), (128, 8))))
    assert [row[3:5] for row in found] == [(64, 4), (128, 8)] * 4
    assert all(row[5] > 0 for row in found) and before == (rows.BLOCK, rows.NUM_WARPS)
