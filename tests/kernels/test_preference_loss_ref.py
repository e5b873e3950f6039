"""The head in waves equals the whole computation by autograd."""

import pytest
import torch
from harness import relative_error

from madpo.kernels.preference_loss_ref import plan_waves, preference_loss_ref
from madpo.trainer.objectives.base import Scored
from madpo.trainer.objectives.registry import OBJECTIVES

H, V = 24, 103
LENGTHS = (3, 5, 9, 1, 0, 4, 6, 6)
WINNERS, LOSERS = torch.tensor([0, 2, 5, 6]), torch.tensor([1, 3, 4, 7])
MARGINS = torch.tensor([0.3, -1.0, 2.0, 1e4], dtype=torch.float64)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    rows = sum(LENGTHS)
    hidden, ref_hidden = torch.randn(2, rows, H, dtype=torch.float64).to(dtype)
    weight, ref_weight = (torch.randn(2, V, H, dtype=torch.float64) * 0.3).to(dtype)
    return hidden, weight, ref_hidden, ref_weight, torch.randint(0, V, (rows,))


def objective_sum(name, logps, ref_logps, sequences=slice(0, 8), edges=slice(0, 4)):
    entry = OBJECTIVES[name]
    first = sequences.start
    lengths = torch.tensor(LENGTHS)[sequences]
    winners, losers = WINNERS[edges] - first, LOSERS[edges] - first
    scored = Scored(logps, ref_logps, lengths, winners, losers, MARGINS[edges])
    return entry.function(scored, entry.params()).losses.sum()


def whole(name, hidden, weight, ref_hidden, ref_weight, targets, softcap):
    """The same loss with all logits at once, in float64, differentiated by autograd."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))

    def logps(h, w):
        z = h.double() @ w.double().T
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return z.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    policy, reference = logps(hidden, weight), logps(ref_hidden, ref_weight)
    loss = 0.25 * objective_sum(name, policy, reference)
    loss.backward()
    return loss.detach(), policy.detach(), reference, hidden.grad, weight.grad


def in_waves(name, hidden, weight, ref_hidden, ref_weight, targets, max_rows, scale=1.0, softcap=None):
    return preference_loss_ref(
        hidden,
        weight,
        targets,
        plan_waves(LENGTHS, (2, 2, 2, 2), (1, 1, 1, 1), max_rows),
        lambda lp, ref, wave: objective_sum(name, lp, ref, wave.sequences, wave.edges),
        scale=scale,
        max_rows=max_rows,
        softcap=softcap,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
    )


@pytest.mark.parametrize("max_rows", [1, 4, 12, 1000], ids="rows{}".format)
@pytest.mark.parametrize("softcap", [None, 2.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", ["dpo", "madpo", "nll"])
def test_waves_equal_the_whole(name, softcap, max_rows):
    hidden, weight, ref_hidden, ref_weight, targets = inputs(torch.float64)
    want = whole(name, hidden, weight, ref_hidden, ref_weight, targets, softcap)
    leaf, weight_leaf = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, logps, ref_logps = in_waves(
        name, leaf, weight_leaf, ref_hidden, ref_weight, targets, max_rows, scale=0.25, softcap=softcap
    )
    loss.backward()
    for got, expected in zip((loss, logps, ref_logps, leaf.grad, weight_leaf.grad), want, strict=True):
        assert got is not None
        torch.testing.assert_close(got.detach(), expected.detach(), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_is_within_what_torch_itself_loses(dtype):
    hidden, weight, ref_hidden, ref_weight, targets = inputs(dtype)
    want = whole("madpo", hidden, weight, ref_hidden, ref_weight, targets, None)
    torch_leaf, torch_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def torch_logps(h, w):
        return (h @ w.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]

    torch_loss = 0.25 * objective_sum(
        "madpo", torch_logps(torch_leaf, torch_weight), torch_logps(ref_hidden, ref_weight)
    )
    torch_loss.backward()
    leaf, weight_leaf = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, _, _ = in_waves("madpo", leaf, weight_leaf, ref_hidden, ref_weight, targets, 12, scale=0.25)
    loss.backward()
    assert leaf.grad is not None and weight_leaf.grad is not None
    assert leaf.grad.dtype == dtype and weight_leaf.grad.dtype == dtype
    assert torch_leaf.grad is not None and torch_weight.grad is not None
    floor = 1e-6
    for got, theirs, truth, factor in (
        (loss, torch_loss, want[0], 2),
        (leaf.grad, torch_leaf.grad, want[3], 3),
        (weight_leaf.grad, torch_weight.grad, want[4], 3),
    ):
        assert relative_error(got, truth) <= factor * relative_error(theirs, truth) + floor


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_gradients_only_where_they_are_wanted(needs):
    hidden, weight, ref_hidden, ref_weight, targets = inputs(torch.float64)
    want = whole("dpo", hidden, weight, ref_hidden, ref_weight, targets, None)
    hidden.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    loss, _, _ = in_waves("dpo", hidden, weight, ref_hidden, ref_weight, targets, 12, scale=0.25)
    torch.testing.assert_close(loss.detach(), want[0])
    if any(needs):
        (3 * loss).backward()
    for tensor, gradient, needed in zip((hidden, weight), want[3:], needs, strict=True):
        if needed:
            assert tensor.grad is not None
            torch.testing.assert_close(tensor.grad, 3 * gradient)
        else:
            assert tensor.grad is None


def test_waves_hold_whole_groups_within_the_budget():
    waves = plan_waves([2, 2, 3, 1, 9, 9, 1, 1], [2, 2, 2, 2], [1, 2, 1, 0], max_rows=8)
    assert [(w.rows.start, w.rows.stop) for w in waves] == [(0, 8), (8, 26), (26, 28)]
    assert [(w.sequences.start, w.sequences.stop) for w in waves] == [(0, 4), (4, 6), (6, 8)]
    assert [(w.edges.start, w.edges.stop) for w in waves] == [(0, 3), (3, 4), (4, 4)]


def test_logits_are_never_kept_for_more_rows_than_the_budget(monkeypatch):
    from madpo.kernels import preference_loss_ref as module

    seen = []
    original = module._Head.logits

    def spy(self, hidden):
        seen.append(len(hidden))
        return original(self, hidden)

    monkeypatch.setattr(module._Head, "logits", spy)
    hidden, weight, ref_hidden, ref_weight, targets = inputs(torch.float32)
    preference_loss_ref(
        hidden.requires_grad_(),
        weight,
        targets,
        plan_waves(LENGTHS, (2, 2, 2, 2), (1, 1, 1, 1), 5),
        lambda lp, ref, wave: objective_sum("dpo", lp, ref, wave.sequences, wave.edges),
        max_rows=5,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
    )
    assert max(seen) == 5


def test_no_gradient_work_in_evaluation(monkeypatch):
    from madpo.kernels import preference_loss_ref as module

    monkeypatch.setattr(module._Head, "d_logits_", lambda *args: pytest.fail("a gradient was formed"))
    hidden, weight, _, _, targets = inputs(torch.float32)
    with torch.no_grad():
        preference_loss_ref(
            hidden.requires_grad_(),
            weight.requires_grad_(),
            targets,
            plan_waves(LENGTHS, (2, 2, 2, 2), (1, 1, 1, 1), 5),
            lambda lp, ref, wave: -lp.sum(),
        )
