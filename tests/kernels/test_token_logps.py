"""Log-probs with any upstream gradient, from logits and from hidden states, against float64."""

from typing import Any

import pytest
import torch
from kernel_cases import CASES, DEVICE, DTYPES, IMPLS, ROW_BYTES, Case, H, V, make_inputs, relative_error

from madpo.kernels.edge_loss import EdgeLoss, MarginWeight
from madpo.kernels.layout import GroupLayout
from madpo.kernels.naive import linear_token_logps_ref, preference_loss_from_logps_ref, token_logps_ref
from madpo.kernels.preference_loss_from_logits import preference_loss_from_logits
from madpo.kernels.token_logps import linear_token_logps, token_logps
from madpo.kernels.transform import LogitTransform

pytestmark = pytest.mark.usefixtures("small_blocks")
FLOOR = 1e-6
TRANSFORMS = {
    "plain": LogitTransform(),
    "softcap": LogitTransform(softcap=5.0),
    "all": LogitTransform(scale=0.7, softcap=8.0, temperature=0.6),
}
LENGTHS = (3, 5, 0, 4, 0, 0, 11, 10)


def make_logits(dtype, rows=33):
    return (4 * torch.randn(rows, V)).to(DEVICE, dtype), torch.randint(0, V, (rows,), device=DEVICE)


def grad(x):
    assert x.grad is not None
    return x.grad


def leaf(x, dtype=None):
    return x.detach().to(dtype or x.dtype, copy=True).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_from_logits(inplace, transform, impl, dtype):
    logits, targets = make_logits(dtype)
    upstream = torch.randn(len(logits), device=DEVICE)
    exact, ours = leaf(logits, torch.float64), leaf(logits)
    want = token_logps_ref(exact, targets, transform)
    want.backward(upstream.double())
    out = token_logps(ours, targets, transform=transform, entropy=True, inplace_backward=inplace, impl=impl)
    z = transform(logits.double())
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    assert relative_error(out.token_logps, want) < FLOOR
    assert relative_error(out.normalisers, z.logsumexp(-1)) < FLOOR
    assert relative_error(out.entropies, entropy) < 5e-6
    found = z.gather(1, targets[:, None])[:, 0]
    assert torch.equal(out.hits, found >= z.amax(-1) - 1e-9)
    out.token_logps.backward(upstream)
    assert grad(ours).dtype == dtype
    # Formed in float32 and rounded once, so it loses no more than rounding the exact gradient does.
    rounding = relative_error(grad(exact).to(dtype), exact.grad)
    assert relative_error(ours.grad, exact.grad) <= 1.01 * rounding + 2e-6
    assert torch.equal(ours.detach(), logits) != inplace


@pytest.mark.parametrize("impl", IMPLS)
def test_the_largest_logit_is_a_hit_and_entropy_survives_masked_logits(impl):
    logits, targets = make_logits(torch.float32, 4)
    targets[:2] = logits[:2].argmax(-1)
    logits[:, 500:] = -torch.inf
    targets %= 500
    out = token_logps(logits, targets, entropy=True, impl=impl)
    assert out.hits.tolist() == (logits.argmax(-1) == targets).tolist()
    z = logits.double()
    exact = -(z.softmax(-1) * z.log_softmax(-1).nan_to_num(neginf=0.0)).sum(-1)
    assert relative_error(out.entropies, exact) < 5e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_an_expanded_upstream_gradient(impl):
    """`sum().backward()` passes one number with stride 0."""
    logits, targets = make_logits(torch.float32, 5)
    ours, exact = leaf(logits), leaf(logits, torch.float64)
    token_logps(ours, targets, impl=impl).token_logps.sum().backward()
    token_logps_ref(exact, targets).sum().backward()
    assert relative_error(ours.grad, exact.grad) < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_an_upstream_gradient_are_not_read(impl):
    logits, targets = make_logits(torch.float32, 4)
    logits[1] = torch.inf
    upstream = torch.tensor([1.0, 0.0, -2.0, 0.0], device=DEVICE)
    ours, exact = leaf(logits), leaf(logits[[0, 2]], torch.float64)
    out = token_logps(ours, targets, impl=impl)
    assert not out.token_logps[1].isfinite()
    out.token_logps.backward(upstream)
    token_logps_ref(exact, targets[[0, 2]]).backward(upstream[[0, 2]].double())
    assert not grad(ours)[[1, 3]].any() and relative_error(grad(ours)[[0, 2]], exact.grad) < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_inplace_backward_works_once(impl):
    logits, targets = make_logits(torch.float32, 3)
    out = token_logps(logits.requires_grad_(), targets, inplace_backward=True, impl=impl)
    out.token_logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.token_logps.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("budget", [2**31, 17 * ROW_BYTES], ids=["whole", "chunks"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_from_hidden_states(transform, budget, impl, dtype):
    inputs = make_inputs(dtype, LENGTHS, bias=True)
    upstream = torch.randn(len(inputs.targets), device=DEVICE)

    def by_torch(kind):
        leaves = [leaf(x, kind) for x in (inputs.hidden, inputs.weight, inputs.bias)]
        logps = linear_token_logps_ref(leaves[0], leaves[1], inputs.targets, leaves[2], transform)
        logps.backward(upstream.to(logps.dtype))
        return [logps, *(x.grad for x in leaves)]

    truth, theirs = by_torch(torch.float64), by_torch(dtype)
    leaves = [leaf(x) for x in (inputs.hidden, inputs.weight, inputs.bias)]
    out = linear_token_logps(
        leaves[0],
        leaves[1],
        inputs.targets,
        bias=leaves[2],
        transform=transform,
        entropy=True,
        budget_bytes=budget,
        impl=impl,
    )
    out.token_logps.backward(upstream)
    assert relative_error(out.token_logps, truth[0]) < FLOOR
    for name, got, torchs, want in zip("hwb", (x.grad for x in leaves), theirs[1:], truth[1:], strict=True):
        assert relative_error(got, want) <= 3 * relative_error(torchs, want) + FLOOR, name
    wide = inputs.to(torch.float64)
    logits = transform(torch.nn.functional.linear(wide.hidden, wide.weight, wide.bias))
    assert torch.equal(out.hits, logits.argmax(-1) == inputs.targets)
    assert relative_error(out.entropies, torch.special.entr(logits.softmax(-1)).sum(-1)) < 5e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_from_hidden_states_only_what_is_needed(needs, impl):
    inputs = make_inputs(lengths=(3, 4))
    hidden, weight = inputs.hidden.requires_grad_(needs[0]), inputs.weight.requires_grad_(needs[1])
    linear_token_logps(hidden, weight, inputs.targets, impl=impl).token_logps.sum().backward()
    assert (hidden.grad is not None, weight.grad is not None) == needs


@pytest.mark.parametrize("impl", IMPLS)
def test_no_rows(impl):
    hidden = torch.empty(0, H, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, H, device=DEVICE, requires_grad=True)
    targets = torch.empty(0, dtype=torch.int64, device=DEVICE)
    out = linear_token_logps(hidden, weight, targets, impl=impl)
    out.token_logps.sum().backward()
    assert out.token_logps.shape == (0,) and not grad(weight).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reference", ["logits", "tokens", "sums", "none"])
@pytest.mark.parametrize("name", ["madpo", "ipo_length", "softcap", "weights_offsets"])
def test_preference_loss_from_logits(name, reference, impl, dtype):
    case: Case = CASES[name]
    options = {"scale": 0.5, **case.options}
    transform = options.get("transform", LogitTransform())
    groups = GroupLayout.pairs(LENGTHS, DEVICE)
    logits, targets = make_logits(dtype)
    # A view with a larger row stride than the policy's logits.
    ref_logits = torch.nn.functional.pad(logits + torch.randn_like(logits), (0, 32))[:, :V]
    ref_tokens = token_logps_ref(ref_logits.double(), targets, transform)
    ref_sums = torch.stack([x.sum() for x in ref_tokens.split(LENGTHS)])
    given = {
        "logits": {"ref_logits": ref_logits},
        "tokens": {"ref_token_logps": ref_tokens.float()},
        "sums": {"ref_logps": ref_sums},
        "none": {},
    }[reference]
    exact, ours = leaf(logits, torch.float64), leaf(logits)
    want_logps = token_logps_ref(exact, targets, transform)
    want = 0.5 * preference_loss_from_logps_ref(
        want_logps, None if reference == "none" else ref_tokens, groups, case.loss
    )
    want.backward()
    out = preference_loss_from_logits(ours, targets, groups, case.loss, **given, **options, impl=impl)
    (2 * out.loss).backward(retain_graph=True)
    assert relative_error(out.loss, want) < 2e-6
    assert relative_error(out.token_logps, want_logps) < FLOOR
    if reference == "logits":
        assert relative_error(out.ref_token_logps, ref_tokens) < FLOOR
    rounding = relative_error(grad(exact).to(dtype), exact.grad)
    assert relative_error(grad(ours).double() / 2, exact.grad) <= 1.01 * rounding + 5e-6
    assert not torch.equal(ours.detach(), logits), "the gradient took the memory of the logits"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: nothing here runs in parallel")
@pytest.mark.parametrize("impl", IMPLS)
def test_preference_loss_from_logits_agrees_bit_for_bit(impl):
    groups, loss = GroupLayout.pairs(LENGTHS, DEVICE), EdgeLoss(beta=0.3)
    logits, targets = make_logits(torch.bfloat16)
    runs = []
    for _ in range(2):
        ours = leaf(logits)
        out = preference_loss_from_logits(ours, targets, groups, loss, impl=impl)
        out.loss.backward()
        runs.append((out.loss, out.token_logps, out.logps, ours.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_logits_of_another_shape_are_refused():
    logits, targets = make_logits(torch.float32, 4)
    with pytest.raises(ValueError, match=r"logits: shape \(2, 2, 1003\)"):
        token_logps(logits.view(2, 2, V), targets)
    with pytest.raises(ValueError, match="consecutive columns"):
        token_logps(logits.T.contiguous().T, targets)
    groups, loss = GroupLayout.pairs((2, 2), DEVICE), EdgeLoss(beta=0.1)
    with pytest.raises(ValueError, match="give one of them"):
        preference_loss_from_logits(
            logits, targets, groups, loss, ref_logits=logits, ref_logps=torch.zeros(2)
        )
    with pytest.raises(ValueError, match=r"targets: shape \(3,\), but \(4,\) is needed"):
        token_logps(logits, targets[:3])
    with pytest.raises(ValueError, match="int64 is needed"):
        token_logps(logits, targets.int())
    cached: tuple[dict[str, Any], ...] = (
        {"ref_logits": logits[:, : V - 3]},
        {"ref_token_logps": torch.zeros(3)},
        {"ref_logps": torch.zeros(4)},
    )
    for bad in cached:
        with pytest.raises(ValueError, match=f"{next(iter(bad))}: shape .* is needed"):
            preference_loss_from_logits(logits, targets, groups, loss, **bad)
    with pytest.raises(ValueError, match=r"margins: shape \(2,\), but \(1,\)"):
        weighted = EdgeLoss(beta=0.1, margins=torch.zeros(2), margin_weight=MarginWeight(4, 0.25, 1, 7))
        preference_loss_from_logits(logits, targets, groups, weighted)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["ref_token_logps", "ref_logps"])
def test_cached_log_probs_may_be_a_column_of_a_table(kind, impl):
    groups, loss = GroupLayout.pairs(LENGTHS, DEVICE), EdgeLoss(beta=0.3)
    logits, targets = make_logits(torch.float32)
    count = len(LENGTHS) if kind == "ref_logps" else len(targets)
    table = torch.randn(count, 3, device=DEVICE)
    losses = []
    for column in (table[:, 1], table[:, 1].contiguous()):
        given: dict[str, Any] = {kind: column}
        out = preference_loss_from_logits(logits, targets, groups, loss, **given, impl=impl)
        losses.append(out.loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl):
    logits, targets = make_logits(torch.float32, 3)
    factor = torch.ones(3, device=DEVICE, requires_grad=True)
    total = (factor * token_logps(logits.requires_grad_(), targets, impl=impl).token_logps).sum()
    (gradient,) = torch.autograd.grad(total, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_holds_no_more_logits_than_forward(impl):
    inputs = make_inputs(lengths=(30, 30))
    sizes = []
    original = torch.Tensor.new_empty

    def new_empty(self, *size, **kwargs):
        sizes.append(size)
        return original(self, *size, **kwargs)

    hidden = inputs.hidden.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        out = linear_token_logps(
            hidden, inputs.weight, inputs.targets, budget_bytes=20 * ROW_BYTES, impl=impl
        )
        out.token_logps.sum().backward()
    assert [size for size in sizes if len(size) == 2] == [(20, 1008), (20, 1008)]
