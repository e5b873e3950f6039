"""The preference head against float64, in both implementations, on every path through it."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import (
    CASES,
    CHUNKS,
    DEVICE,
    DTYPES,
    IMPLS,
    ONLY_THE_EDGES,
    ROW_BYTES,
    VOCAB_BLOCKS,
    WHOLE,
    Case,
    H,
    V,
    madpo,
    make_inputs,
    relative_error,
    run,
    run_ref,
    vector,
)

from madpo.kernels.chunks import plan_chunks
from madpo.kernels.distribution_loss import distribution_loss
from madpo.kernels.edge_loss import EdgeLoss, edge_loss_ref
from madpo.kernels.gemm import mm_into
from madpo.kernels.layout import GroupLayout, GroupRange
from madpo.kernels.naive import preference_loss_ref
from madpo.kernels.preference_loss import Reference, preference_loss
from madpo.kernels.preference_loss_from_logits import preference_loss_from_logits
from madpo.kernels.token_logps import linear_token_logps, token_logps
from madpo.kernels.token_scores import TokenScores

pytestmark = pytest.mark.usefixtures("small_blocks")
FLOOR = 1e-6


def assert_as_good_as_torch(got, truth, torch_loses):
    """Outputs within twice, gradients within three times what torch loses in the same dtype."""
    for name, want in truth.items():
        ours, theirs = got[name], torch_loses[name]
        if want is None:
            assert ours is None, name
            continue
        factor = 3 if name.startswith("d_") else 2
        allowed = factor * relative_error(theirs, want) + FLOOR
        error = relative_error(ours, want)
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


NAMES_AND_DTYPES = [
    (name, dtype) for name in CASES for dtype in DTYPES[: 1 if name in ONLY_THE_EDGES else None]
]


def test_the_budgets_of_the_cases_cut_as_they_say():
    """All rows at once, two chunks, and blocks of the vocabulary beside a chunk that has all of it."""
    inputs = make_inputs()

    def chunks(budget, narrow):
        return [chunk.columns for chunk in plan_chunks(inputs.groups, V, budget, torch.float32, narrow)]

    for narrow in DTYPES:
        assert chunks(WHOLE, narrow) == [V]
        assert chunks(CHUNKS, narrow) == [V, V]
        blocks = chunks(VOCAB_BLOCKS, narrow)
        assert len(blocks) == 4 and blocks[0] == blocks[3] == 256 and blocks[1] == V


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "name, dtype",
    NAMES_AND_DTYPES,
    ids=[f"{n}-{'fp32' if d == DTYPES[0] else 'bf16'}" for n, d in NAMES_AND_DTYPES],
)
def test_error_is_within_what_torch_itself_loses(name, impl, dtype):
    case = CASES[name]
    inputs = make_inputs(dtype, bias=case.bias)
    got = run(inputs, case, impl)
    assert_as_good_as_torch(got, run_ref(inputs, case, torch.float64), run_ref(inputs, case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["madpo", "two_chunks", "vocab_blocks"])
def test_wide_logits_lose_nothing(name, dtype):
    """Log-probs and loss are as exact as in float32, whatever the inputs' dtype."""
    case = CASES[name]
    case = Case(case.loss, case.options, case.bias, case.budget_bytes if dtype == torch.float32 else 2**31)
    inputs = make_inputs(dtype, bias=case.bias)
    got, truth = run(inputs, case, "triton"), run_ref(inputs, case, torch.float64)
    for key in ("loss", "token_logps", "ref_token_logps"):
        assert relative_error(got[key], truth[key]) < 1e-6, key


def test_narrow_logits_are_used_only_where_wide_ones_do_not_fit():
    inputs = make_inputs(torch.bfloat16)
    truth = run_ref(inputs, Case(madpo()), torch.float64)["token_logps"]
    wide = run(inputs, Case(madpo(), budget_bytes=11 * ROW_BYTES), "triton")["token_logps"]
    narrow = run(inputs, Case(madpo(), budget_bytes=6 * ROW_BYTES), "triton")["token_logps"]
    blocks = run(inputs, Case(madpo(), budget_bytes=5 * ROW_BYTES), "triton")["token_logps"]
    assert relative_error(wide, truth) < 1e-6
    assert relative_error(blocks[-11:], truth[-11:]) < 1e-6
    assert 1e-5 < relative_error(narrow[-11:], truth[-11:]) < 1e-2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (1, 1), (5, 0, 0, 5), (1030, 1)], ids=str)
def test_empty_one_token_and_long_completions(lengths, impl):
    inputs = make_inputs(lengths=lengths, vocab_size=37)
    inputs = type(inputs)(**{**vars(inputs), "reference": Reference()})
    case = Case(EdgeLoss(beta=0.3, length_normalised=True))
    got = run(inputs, case, impl)
    assert_as_good_as_torch(got, run_ref(inputs, case, torch.float64), run_ref(inputs, case, torch.float32))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_groups(impl):
    inputs = make_inputs(lengths=())
    got = run(inputs, Case(EdgeLoss(beta=0.3)), impl)
    assert got["loss"] == 0 and not got["d_weight"].any() and got["d_hidden"].shape == (0, H)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("margin", [0.0, 7.0, -7.0, 1e4, -1e4, 88.0, -6.999])
def test_margins_at_the_edges(margin, impl):
    inputs = make_inputs(lengths=(3, 2))
    weight = madpo().margin_weight
    margins = torch.tensor([margin], device=DEVICE, dtype=torch.float64)
    case = Case(EdgeLoss(beta=0.3, margins=margins, margin_weight=weight))
    got, truth = run(inputs, case, impl), run_ref(inputs, case, torch.float64)
    for name, want in truth.items():
        if want is not None:
            assert relative_error(got[name], want) < 5e-6, name


@pytest.mark.parametrize("impl", IMPLS)
def test_saturated_pairs_have_no_gradient(impl):
    """A gradient of exactly 0 in a log-prob gives exact zeros."""
    inputs = make_inputs()
    sums = torch.zeros(8, dtype=torch.float64, device=DEVICE)
    sums[0::2] = -1e5
    inputs = type(inputs)(**{**vars(inputs), "reference": Reference(logps=sums)})
    got = run(inputs, Case(EdgeLoss(beta=0.3)), impl)
    assert got["loss"] == 0 and not got["d_hidden"].any() and not got["d_weight"].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", [WHOLE, VOCAB_BLOCKS], ids=["whole", "vocab_blocks"])
def test_rows_of_slope_zero_are_not_read(budget, impl):
    """A row of logits on which the loss does not depend changes nothing, even if infinite."""
    inputs = make_inputs()
    kept = torch.arange(len(inputs.targets), device=DEVICE) % 3 > 0

    def objective(logps, ref_logps, group_range):
        return torch.where(kept[group_range.rows], logps, 0.0).sum()

    def gradients(scale):
        hidden = inputs.hidden.where(kept[:, None], scale * inputs.hidden.sign()).requires_grad_()
        weight = inputs.weight.clone().requires_grad_()
        args = hidden, weight, inputs.targets, inputs.groups, objective
        out = preference_loss(*args, budget_bytes=budget, impl=impl)
        out.loss.backward()
        return out.token_logps, hidden.grad, weight.grad

    logps, *got = gradients(1e38)
    assert not logps[~kept].isfinite().any() and logps[kept].isfinite().all()
    for ours, want in zip(got, gradients(1.0)[1:], strict=True):
        assert ours is not None and ours.isfinite().all() and relative_error(ours, want) < FLOOR
    assert got[0] is not None and not got[0][~kept].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_later_slab_may_have_by_far_the_largest_logits(impl):
    """The running maximum follows, or e^200 would overflow."""
    inputs = make_inputs(bias=True)
    assert inputs.bias is not None and inputs.reference.bias is not None
    for bias in (inputs.bias, inputs.reference.bias):
        bias[256:512] += 200
    case = Case(EdgeLoss(beta=0.3), bias=True, budget_bytes=VOCAB_BLOCKS)
    got, truth = run(inputs, case, impl), run_ref(inputs, case, torch.float64)
    assert_as_good_as_torch(got, truth, run_ref(inputs, case, torch.float32))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=["fp32", "bf16"])
def test_a_narrow_product_is_rounded_once(out_dtype, add):
    """Products of strided operands over a long axis, for every dtype of the output."""
    a = torch.randn(9, 4099, device=DEVICE).to(torch.bfloat16)[:, 1:4097]
    b = torch.randn(7, 4100, device=DEVICE).to(torch.bfloat16)[:, 2:4098].T
    out = torch.randn(9, 16, device=DEVICE).to(out_dtype)[:, :7]
    exact = a.double() @ b.double() + (out.double() if add else 0.0)
    got = mm_into(out, a, b, add=add)
    assert got.data_ptr() == out.data_ptr()
    rounding = relative_error(exact.to(out_dtype), exact)
    assert relative_error(got, exact) <= 1.01 * rounding + 2e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_saturated_the_wrong_way_is_linear(impl):
    inputs = make_inputs()
    sums = torch.zeros(8, dtype=torch.float64, device=DEVICE)
    sums[0::2] = 1e5
    inputs = type(inputs)(**{**vars(inputs), "reference": Reference(logps=sums)})
    case = Case(EdgeLoss(beta=0.3))
    got, truth = run(inputs, case, impl), run_ref(inputs, case, torch.float64)
    for name in ("loss", "d_hidden", "d_weight"):
        assert relative_error(got[name], truth[name]) < 2e-6, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cached", ["token_logps", "logps", "none"])
def test_cached_reference(cached, impl):
    inputs = make_inputs()
    tokens = torch.randn(len(inputs.targets), device=DEVICE) - 5
    sums = torch.stack([x.double().sum() for x in tokens.split(inputs.groups.lengths)])
    reference = {"token_logps": Reference(token_logps=tokens), "logps": Reference(logps=sums)}.get(cached)
    inputs = type(inputs)(**{**vars(inputs), "reference": reference or Reference()})
    case = CASES["dpo"]
    assert_as_good_as_torch(
        run(inputs, case, impl), run_ref(inputs, case, torch.float64), run_ref(inputs, case, torch.float32)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", [WHOLE, CHUNKS, VOCAB_BLOCKS], ids=["whole", "chunks", "vocab_blocks"])
@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_only_where_they_are_wanted(needs, budget, impl):
    inputs = make_inputs()
    case = Case(madpo(), budget_bytes=budget)
    got, truth = run(inputs, case, impl, needs), run_ref(inputs, case, torch.float64)
    for name, needed in zip(("d_hidden", "d_weight"), needs, strict=True):
        if needed:
            assert relative_error(got[name], truth[name]) < 5e-6
        else:
            assert got[name] is None
    assert relative_error(got["loss"], truth["loss"]) < FLOOR


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_work_in_evaluation(impl, monkeypatch):
    from madpo.kernels import preference_loss as module

    monkeypatch.setattr(module._Head, "form_gradients", lambda *args: pytest.fail("a gradient was formed"))
    with torch.no_grad():
        run(make_inputs(), CASES["madpo"], impl)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: nothing here runs in parallel")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["madpo", "two_chunks", "vocab_blocks"])
def test_two_runs_agree_bit_for_bit(name, impl):
    inputs = make_inputs(torch.bfloat16, bias=CASES[name].bias)
    first, second = (run(inputs, CASES[name], impl) for _ in range(2))
    for key, value in first.items():
        assert value is None or torch.equal(value, second[key]), key


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradient_scales(impl, monkeypatch):
    """Also elements beyond the blocks that run at once."""
    from madpo.kernels import logit_rows

    monkeypatch.setattr(logit_rows, "SCALE_PROGRAMS", 2)
    inputs = make_inputs()
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    out = preference_loss(hidden, weight, inputs.targets, inputs.groups, madpo(), impl=impl)
    (3 * out.loss).backward()
    want = run(type(inputs)(**{**vars(inputs), "reference": Reference()}), Case(madpo()), impl)
    torch.testing.assert_close(hidden.grad, 3 * want["d_hidden"])
    torch.testing.assert_close(weight.grad, 3 * want["d_weight"])


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_works_once(impl):
    inputs = make_inputs(lengths=(2, 2))
    hidden = inputs.hidden.requires_grad_()
    out = preference_loss(hidden, inputs.weight, inputs.targets, inputs.groups, CASES["dpo"].loss, impl=impl)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward works once"):
        out.loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "budget", [2**31, 30 * ROW_BYTES, 9 * ROW_BYTES], ids=["whole", "chunks", "vocab_blocks"]
)
def test_a_ranked_list_has_many_edges_for_one_completion(budget, impl):
    """Seven completions and their 21 edges, beside a group of three; more edges than a block holds."""
    count = 10
    lengths = (3, 1, 4, 1, 5, 9, 2, 6, 0, 3, 2, 2, 7)
    first = [(w, x) for w in range(count) for x in range(w + 1, count)]
    edges = torch.tensor([*first, (10, 11), (10, 12), (11, 12)], device=DEVICE)
    groups = GroupLayout(lengths, (count, 3), (len(first), 3), edges[:, 0], edges[:, 1])
    inputs = make_inputs(lengths=(*lengths, 0))
    inputs = type(inputs)(**{**vars(inputs), "groups": groups})
    case = Case(EdgeLoss(beta=0.3, length_normalised=True), budget_bytes=budget)
    assert_as_good_as_torch(
        run(inputs, case, impl), run_ref(inputs, case, torch.float64), run_ref(inputs, case, torch.float32)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", [WHOLE, CHUNKS, VOCAB_BLOCKS], ids=["whole", "chunks", "vocab_blocks"])
def test_any_objective_takes_the_same_path(budget, impl):
    """An objective of token log-probs, differentiated by autograd, against float64."""
    inputs = make_inputs()

    def objective(logps, ref_logps, group_range):
        return -((0.1 * logps).exp() * (2 - (logps - ref_logps).tanh())).sum()

    results = {}
    for dtype in (torch.float32, torch.float64):
        narrowed = inputs.to(dtype)
        leaves = narrowed.hidden.requires_grad_(), narrowed.weight.requires_grad_()
        args = (*leaves, inputs.targets, inputs.groups, objective, narrowed.reference)
        if dtype == torch.float64:
            loss = preference_loss_ref(*args, scale=0.5)[0]
        else:
            loss = preference_loss(*args, scale=0.5, budget_bytes=budget, impl=impl).loss
        loss.backward()
        results[dtype] = (loss, *(leaf.grad for leaf in leaves))
    for got, want in zip(results[torch.float32], results[torch.float64], strict=True):
        assert relative_error(got, want) < 2e-6


def test_the_edge_loss_in_float64_matches_its_gradient():
    """The gradient of the plain torch twin, against finite differences."""
    groups = GroupLayout.pairs((2, 3, 1, 4), "cpu")
    lengths = torch.tensor(groups.lengths)
    offsets = torch.randn(2, dtype=torch.float64)
    for curve in ("sigmoid", "ipo"):
        loss = EdgeLoss(beta=0.3, curve=curve, positive=0.9, negative=0.1, offsets=offsets)
        logps = torch.randn(4, dtype=torch.float64, requires_grad=True)
        check = lambda x, loss=loss: edge_loss_ref(x, None, lengths, groups.chosen, groups.rejected, loss)  # noqa: E731
        assert torch.autograd.gradcheck(check, logps)


def test_same_policy_and_reference_have_a_margin_of_exactly_zero():
    inputs = make_inputs(torch.bfloat16)
    same = Reference(inputs.hidden.clone(), inputs.weight.clone())
    for budget in (WHOLE, CHUNKS, VOCAB_BLOCKS):
        out = preference_loss(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            inputs.groups,
            EdgeLoss(beta=0.3),
            same,
            budget_bytes=budget,
            impl="triton",
        )
        assert out.ref_token_logps is not None and torch.equal(out.token_logps, out.ref_token_logps)
        assert float(out.loss) == pytest.approx(4 * torch.tensor(2.0).log().item(), rel=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="there it is an assertion on the device")
@pytest.mark.parametrize("bad", [-1, V, -100])
def test_a_target_outside_the_vocabulary_is_refused_with_what_to_pass(bad):
    inputs = make_inputs(lengths=(2, 2))
    inputs.targets[1] = bad
    hidden, weight, targets, groups, loss = (
        *(inputs.hidden, inputs.weight, inputs.targets, inputs.groups),
        EdgeLoss(beta=0.3),
    )

    def total(tokens: TokenScores, _: GroupRange) -> torch.Tensor:
        return tokens.token_logps.sum()

    ops: list[Callable[[], Any]] = [
        lambda: preference_loss(hidden, weight, targets, groups, loss),
        lambda: preference_loss_from_logits(hidden @ weight.T, targets, groups, loss),
        lambda: distribution_loss(hidden, weight, targets, groups, total),
        lambda: linear_token_logps(hidden, weight, targets),
        lambda: token_logps(hidden @ weight.T, targets),
    ]
    for op in ops:
        with pytest.raises(ValueError, match=rf"^targets: {bad} in row 1 is not in \[0, 1003\)\. No label"):
            op()


def test_contradicting_arguments_are_refused():
    inputs = make_inputs(lengths=(2, 2))
    args = inputs.hidden, inputs.weight
    loss = EdgeLoss(beta=0.3)
    with pytest.raises(ValueError, match="lengths sum to 4, but 3 are needed"):
        preference_loss(inputs.hidden[:3], inputs.weight, inputs.targets[:3], inputs.groups, loss)
    with pytest.raises(ValueError, match="hidden and weight come together"):
        preference_loss(*args, inputs.targets, inputs.groups, loss, Reference(hidden=inputs.hidden))
    with pytest.raises(ValueError, match="give one of them"):
        twice = Reference(token_logps=torch.zeros(4), logps=torch.zeros(2))
        preference_loss(*args, inputs.targets, inputs.groups, loss, twice)
    with pytest.raises(ValueError, match="'cuda' is not one of auto"):
        preference_loss(*args, inputs.targets, inputs.groups, loss, impl="cuda")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="use torch"):
        doubled = [x.double() for x in args]
        preference_loss(doubled[0], doubled[1], inputs.targets, inputs.groups, loss, impl="triton")
    with pytest.raises(ValueError, match="both or neither"):
        EdgeLoss(beta=0.1, margins=torch.zeros(1))
    with pytest.raises(ValueError, match="do not form pairs"):
        GroupLayout.pairs((1, 2, 3), "cpu")
    with pytest.raises(ValueError, match="curve: 'exp' is not one of"):
        EdgeLoss(beta=0.1, curve="exp")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(6, H)}, r"targets: shape \(4,\), but \(6,\) is needed"),
        ({"weight": torch.zeros(V, H - 1)}, r"weight: shape"),
        ({"weight": torch.zeros(V, H, dtype=torch.bfloat16)}, "weight: torch.bfloat16 on .*cast one of them"),
        ({"hidden": torch.zeros(2, 2, H)}, "pack the completion tokens"),
        ({"bias": torch.zeros(V - 1)}, r"bias: shape \(1002,\), but \(1003,\)"),
        ({"targets": torch.zeros(4)}, "torch.int64 is needed"),
        (
            {"reference": Reference(torch.zeros(4, H), torch.zeros(V + 5, H))},
            r"reference.weight: shape \(1008",
        ),
        ({"reference": Reference(token_logps=torch.zeros(3))}, "reference.token_logps: shape"),
        ({"reference": Reference(logps=torch.zeros(1))}, "reference.logps: shape"),
        ({"loss": EdgeLoss(beta=0.1, weights=torch.zeros(2))}, r"weights: shape \(2,\), but \(1,\)"),
        ({"logits_dtype": torch.float16}, "logits_dtype: torch.float16"),
    ],
)
def test_shapes_and_dtypes_that_contradict_each_other_are_refused(change, message):
    """A kernel would read beyond the end of a tensor that is too short."""
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, H),
        "weight": torch.zeros(V, H),
        "targets": torch.zeros(4, dtype=torch.int64),
        "groups": GroupLayout.pairs((2, 2), "cpu"),
        "loss": EdgeLoss(beta=0.3),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        preference_loss(**arguments)


def test_float16_gradients_are_refused():
    hidden, weight = torch.zeros(4, H, dtype=torch.float16), torch.zeros(V, H, dtype=torch.float16)
    args = torch.zeros(4, dtype=torch.int64), GroupLayout.pairs((2, 2), "cpu"), EdgeLoss(beta=0.3)
    assert preference_loss(hidden, weight, *args).loss.isfinite()
    with pytest.raises(ValueError, match="use bfloat16 or float32"):
        preference_loss(hidden.requires_grad_(), weight, *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["madpo", "two_chunks", "vocab_blocks", "everything"])
def test_every_product_is_one_that_a_gpu_has(name, dtype, monkeypatch):
    """On a GPU torch multiplies equal dtypes, or bfloat16 into float32, and nothing else."""
    from madpo.kernels import preference_loss as module

    original = module.mm_into

    def checked(out, a, b, *, add=False):
        assert a.dtype == b.dtype
        assert out.dtype == a.dtype or (a.dtype == torch.bfloat16 and out.dtype == torch.float32)
        return original(out, a, b, add=add)

    monkeypatch.setattr(module, "mm_into", checked)
    run(make_inputs(dtype, bias=CASES[name].bias), CASES[name], "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_transposed_tensors_are_taken_as_they_are(impl):
    inputs = make_inputs(lengths=(3, 4))
    want = run(inputs, CASES["dpo"], impl)
    hidden = inputs.hidden.T.contiguous().T.requires_grad_()
    weight = inputs.weight.T.contiguous().T.requires_grad_()
    groups, loss = inputs.groups, CASES["dpo"].loss
    preference_loss(hidden, weight, inputs.targets, groups, loss, inputs.reference, impl=impl).loss.backward()
    torch.testing.assert_close(hidden.grad, want["d_hidden"])
    torch.testing.assert_close(weight.grad, want["d_weight"])


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_narrows_nothing(impl):
    inputs = make_inputs()
    want = run(inputs, CASES["vocab_blocks"], impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(inputs, CASES["vocab_blocks"], impl)
    assert all(torch.equal(got[name], want[name]) for name in ("loss", "d_hidden", "d_weight"))


@pytest.mark.parametrize("impl", IMPLS)
def test_an_objective_may_ignore_a_wave(impl):
    """A chunk whose loss does not depend on its log-probs has no gradient."""
    inputs = make_inputs()

    def objective(logps, ref_logps, group_range):
        return -logps.sum() if group_range.groups.start == 0 else logps.new_zeros(())

    hidden = inputs.hidden.requires_grad_()
    args = hidden, inputs.weight, inputs.targets, inputs.groups, objective
    preference_loss(*args, budget_bytes=CHUNKS, impl=impl).loss.backward()
    assert hidden.grad is not None
    assert hidden.grad[:15].any() and not hidden.grad[15:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_missing_margin_shows(impl):
    inputs = make_inputs(lengths=(2, 2))
    case = Case(EdgeLoss(beta=0.3, margins=vector(torch.nan), margin_weight=madpo().margin_weight))
    assert run(inputs, case, impl)["loss"].isnan()


@pytest.mark.skipif(DEVICE == "cuda", reason="about CPUs")
def test_triton_on_a_cpu_is_refused_with_the_way_out():
    code = (
        "import torch\n"
        "from madpo.kernels.token_logps import token_logps\n"
        "logits, targets = torch.zeros(1, 4), torch.zeros(1, dtype=torch.long)\n"
        "print(token_logps(logits, targets).token_logps)\n"
        "token_logps(logits, targets, impl='triton')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert "-1.3863" in done.stdout
    assert "ValueError: impl: triton needs tensors on a GPU" in done.stderr
