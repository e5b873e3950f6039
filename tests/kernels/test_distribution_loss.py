"""Statistics of whole distributions, and gradients through them, against autograd on the naive logits."""

from typing import Any

import pytest
import torch
from kernel_cases import relative_error

from madpo.kernels.distribution_loss import distribution_loss
from madpo.kernels.layout import GroupLayout, GroupRange
from madpo.kernels.preference_loss import Reference
from madpo.kernels.token_scores import TokenScores
from madpo.kernels.transform import LogitTransform

M, H, V = 14, 10, 67
GROUPS = ((3, 4), (1, 6))


def collisions_of(tokens: TokenScores) -> torch.Tensor:
    assert tokens.log_collisions is not None
    return tokens.log_collisions


def chunk_loss(rows: TokenScores, group_range: GroupRange) -> torch.Tensor:
    """A loss that depends on every score: differentiably where there is a gradient."""
    assert rows.kl is not None and rows.ref_token_logps is not None
    weights = torch.arange(group_range.rows.start, group_range.rows.stop, dtype=rows.kl.dtype) / M
    ratios = rows.token_logps - rows.ref_token_logps
    return (weights * (torch.sin(ratios) + rows.kl.square() + collisions_of(rows) * ratios)).sum()


@pytest.mark.parametrize("budget", [2**31, 1], ids=["one-chunk", "a-chunk-each"])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0)], ids=["", "scale-softcap"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_equals_autograd_on_naive_logits(budget, transform, with_bias):
    hidden, ref_hidden = torch.randn(2, M, H, dtype=torch.float64)
    weight, ref_weight = torch.randn(2, V, H, dtype=torch.float64)
    bias, ref_bias = torch.randn(2, V, dtype=torch.float64) if with_bias else (None, None)
    targets = torch.randint(0, V, (M,))
    flat = [n for group in GROUPS for n in group]
    groups = GroupLayout(tuple(flat), (2, 2), (1, 1), torch.tensor([0, 2]), torch.tensor([1, 3]))
    leaves: list[Any] = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]
    out = distribution_loss(
        leaves[0],
        leaves[1],
        targets,
        groups,
        chunk_loss,
        Reference(ref_hidden, ref_weight, ref_bias),
        bias=leaves[2],
        transform=transform,
        scale=0.7,
        budget_bytes=budget,
    )
    (3 * out.loss).backward()

    plain: list[Any] = [None if x is None else x.clone().requires_grad_() for x in (hidden, weight, bias)]

    def logps(h, w, b):
        return transform(h @ w.T + (0 if b is None else b)).log_softmax(1)

    p, q = logps(*plain), logps(ref_hidden, ref_weight, ref_bias)
    at = torch.arange(M), targets
    collisions = p.detach().exp().square().sum(1).log()
    rows = TokenScores(
        p[at], q[at], collisions, torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(1)
    )
    whole = slice(0, None)
    want = 0.7 * chunk_loss(rows, GroupRange(whole, whole, whole, slice(0, M)))
    (3 * want).backward()
    assert relative_error(out.loss, want) < 1e-12
    for got, truth in zip(out.tokens, rows, strict=True):
        assert got is not None and truth is not None and not got.requires_grad
        assert relative_error(got, truth) < 1e-12
    for leaf, truth in zip(leaves, plain, strict=True):
        if leaf is not None:
            assert relative_error(leaf.grad, truth.grad) < 1e-12


def test_log_probs_that_were_scored_before_take_the_place_of_the_reference():
    """Everything is the same but the KL, which cannot be had from them."""
    hidden, ref_hidden = torch.randn(2, M, H, dtype=torch.float64)
    weight, ref_weight = torch.randn(2, V, H, dtype=torch.float64)
    targets = torch.randint(0, V, (M,))
    lengths = tuple(n for group in GROUPS for n in group)
    groups = GroupLayout(lengths, (2, 2), (1, 1), torch.tensor([0, 2]), torch.tensor([1, 3]))

    def loss(rows: TokenScores, group_range: GroupRange) -> torch.Tensor:
        assert rows.ref_token_logps is not None
        return torch.sin(rows.token_logps - rows.ref_token_logps).sum()

    def run(reference: Reference) -> tuple[Any, torch.Tensor]:
        leaf = hidden.clone().requires_grad_()
        out = distribution_loss(leaf, weight, targets, groups, loss, reference, budget_bytes=1)
        out.loss.backward()
        assert leaf.grad is not None
        return out, leaf.grad

    want, want_gradient = run(Reference(ref_hidden, ref_weight))
    got, gradient = run(Reference(token_logps=want.tokens.ref_token_logps))
    assert torch.equal(got.loss, want.loss) and torch.equal(gradient, want_gradient)
    assert torch.equal(got.tokens.ref_token_logps, want.tokens.ref_token_logps) and got.tokens.kl is None


def test_without_gradients_nothing_but_the_statistics_is_formed():
    hidden, weight = torch.randn(3, H), torch.randn(V, H, requires_grad=True)
    groups = GroupLayout((1, 2), (2,), (1,), torch.tensor([0]), torch.tensor([1]))
    with torch.no_grad():
        out = distribution_loss(
            hidden, weight, torch.tensor([1, 2, 3]), groups, lambda tokens, _: collisions_of(tokens).sum()
        )
    assert not out.loss.requires_grad and out.tokens.kl is None and out.tokens.ref_token_logps is None
    uniform = torch.zeros(V, H)
    with torch.no_grad():
        flat = distribution_loss(
            hidden, uniform, torch.tensor([1, 2, 3]), groups, lambda tokens, _: collisions_of(tokens).sum()
        )
    torch.testing.assert_close(collisions_of(flat.tokens).exp(), torch.full((3,), 1 / V))


def test_narrow_inputs_are_computed_wide_and_return_narrow_gradients():
    hidden = torch.randn(3, H, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.bfloat16, requires_grad=True)
    groups = GroupLayout((1, 2), (2,), (1,), torch.tensor([0]), torch.tensor([1]))
    out = distribution_loss(
        hidden, weight, torch.tensor([1, 2, 3]), groups, lambda tokens, _: tokens.token_logps.sum()
    )
    out.loss.backward()
    assert out.tokens.token_logps.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    wide = hidden.detach().double().requires_grad_()
    (wide @ weight.detach().double().T).log_softmax(1)[
        torch.arange(3), torch.tensor([1, 2, 3])
    ].sum().backward()
    assert relative_error(hidden.grad, wide.grad) < 4e-3
