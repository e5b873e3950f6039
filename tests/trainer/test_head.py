"""Every objective through the head: the loss of the whole batch, and the gradient of plain autograd."""

import dataclasses
from typing import Any

import pytest
import torch
from facts import Facts
from kernel_cases import relative_error
from odd_settings import CASES, ODD, keys, numeric_gradients, opinion
from torch import nn

from madpo.kernels.token_scores import TokenScores
from madpo.trainer.batches.packing import pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.head import OutputHead, PreferenceHead
from madpo.trainer.objectives import build
from madpo.trainer.objectives.base import Item

H, V = 12, 61
LENGTHS = ((3, 4), (1, 6), (5, 2), (2, 2))
MARGINS = (0.4, -9.0, 2.0, -0.1)
ONE_BATCH = [
    (name, index)
    for name, index in CASES
    if not build(name, **keys(name, ODD[name][index])).needs & {"batch"}
]
BUDGETS = pytest.mark.parametrize("rows", [1000, 9], ids=["one-chunk", "chunks-and-blocks"])


def batch_of(item: Item, above_zero: bool = False, weights: tuple[float, ...] = ()):
    def draw(count):
        return torch.randint(0, V, (count,)).tolist()

    groups = [
        TokenGroup(draw(4), [draw(n) for n in lengths], [(0, 1, abs(margin) if above_zero else margin)])
        for lengths, margin in zip(LENGTHS, MARGINS, strict=True)
    ]
    if item is Item.TOKEN:
        groups = [TokenGroup(group.prompt, group.completions[:1], []) for group in groups]
    if item is Item.SEQUENCE:
        groups = [TokenGroup(group.prompt, group.completions, [], [1, -1]) for group in groups]
    if weights:
        groups = [
            dataclasses.replace(
                group,
                edge_weights=[weight] * len(group.edges),
                completion_weights=[weight] * len(group.completions),
            )
            for group, weight in zip(groups, weights, strict=True)
        ]
    return dataclasses.replace(pack(groups), scale=0.25)


def states(batch):
    """Hidden states and weights of policy and reference, which all want gradients."""
    hidden, ref_hidden = torch.randn(2, len(batch.targets), H, dtype=torch.float64)
    weight, ref_weight = (nn.Parameter(torch.randn(V, H, dtype=torch.float64) * 0.4) for _ in range(2))
    return hidden.requires_grad_(), weight, ref_hidden.requires_grad_(), ref_weight


def plain_rows(batch, hidden, weight, ref_hidden, ref_weight):
    """The scores of the whole batch's tokens, by plain torch."""
    policy, other = ((h @ w.T).log_softmax(-1) for h, w in ((hidden, weight), (ref_hidden, ref_weight)))
    logps, ref_logps = (rows.gather(1, batch.targets[:, None])[:, 0] for rows in (policy, other.detach()))
    collisions = policy.detach().exp().square().sum(1).log()
    return logps, ref_logps, collisions, (other.detach().exp() * (other.detach() - policy)).sum(1)


@BUDGETS
@pytest.mark.parametrize("name, index", ONE_BATCH)
def test_every_objective_through_the_head(name, index, rows):
    """At odd parameters, against autograd through the objective and against the second opinion on it; and no
    gradient reaches the reference."""
    settings = ODD[name][index]
    bound = build(name, **keys(name, settings))
    batch = batch_of(bound.item, above_zero=name == "odpo")
    hidden, weight, ref_hidden, ref_weight = states(batch)
    reference = OutputHead(ref_weight) if bound.needs_reference else None
    head = PreferenceHead(OutputHead(weight), reference, bound, rows * 64 * 8)
    loss, logps, ref_logps, *_ = head(hidden, ref_hidden if bound.needs_reference else None, batch)
    loss.backward()
    assert ref_hidden.grad is None and ref_weight.grad is None

    plain, plain_weight = hidden.detach().requires_grad_(), weight.detach().clone().requires_grad_()
    tokens, ref, collisions, kl = plain_rows(batch, plain, plain_weight, ref_hidden, ref_weight)
    scores = TokenScores(tokens, ref if bound.needs_reference else None, collisions, kl)
    want = 0.25 * bound.of_groups(batch.scored(scores)).losses.sum()
    leaves = plain, plain_weight
    by_autograd = torch.autograd.grad(want, leaves, retain_graph=True)
    assert relative_error(loss, want) < 1e-12
    assert relative_error(logps, tokens) < 1e-12
    assert (ref_logps is None) == (not bound.needs_reference)
    for got, true in zip((hidden.grad, weight.grad), by_autograd, strict=True):
        assert relative_error(got, true) < 1e-9

    layout = batch.seq_lengths, batch.chosen, batch.rejected, batch.margins, batch.labels
    parts: list[Any] = [each.detach().numpy() for each in (tokens, ref, *layout, collisions, kl)]
    x = Facts(*parts)
    assert loss.item() == pytest.approx(0.25 * opinion(name, x, settings)[0].sum(), rel=1e-7)
    of_tokens, of_kl = (torch.from_numpy(0.25 * each) for each in numeric_gradients(name, x, settings))
    for got, true in zip(
        (hidden.grad, weight.grad),
        torch.autograd.grad((tokens * of_tokens).sum() + (kl * of_kl).sum(), leaves),
        strict=True,
    ):
        assert relative_error(got, true) < 1e-6


WEIGHTED = [("madpo", 0), ("ipo", 0), ("mixdpo", 0), ("wpo", 0), ("apo_zero_unpaired", 0), ("nll", 0)]
"""Losses that kernels form, with a weight of their own or none, and that autograd differentiates, of every
kind of item."""


@BUDGETS
@pytest.mark.parametrize("name, index", WEIGHTED)
def test_weights_that_come_with_the_data_multiply_the_losses(name, index, rows):
    settings = ODD[name][index]
    bound = build(name, **keys(name, settings))
    factors = (0.7, 2.5, 0.0, 1.3)
    plain, batch = batch_of(bound.item), batch_of(bound.item, weights=factors)
    batch = dataclasses.replace(
        plain, edge_weights=batch.edge_weights, completion_weights=batch.completion_weights
    )
    hidden, weight, ref_hidden, ref_weight = states(batch)
    reference = OutputHead(ref_weight) if bound.needs_reference else None
    head = PreferenceHead(OutputHead(weight), reference, bound, rows * 64 * 8)
    loss, *_ = head(hidden, ref_hidden if bound.needs_reference else None, batch)
    loss.backward()

    leaves = hidden.detach().requires_grad_(), weight.detach().clone().requires_grad_()
    tokens, ref, collisions, kl = plain_rows(batch, *leaves, ref_hidden, ref_weight)
    scores = TokenScores(tokens, ref if bound.needs_reference else None, collisions, kl)
    losses = bound.of_groups(plain.scored(scores)).losses
    items = {
        Item.EDGE: torch.arange(4),
        Item.SEQUENCE: torch.arange(8) // 2,
        Item.TOKEN: torch.arange(len(batch.lengths)).repeat_interleave(batch.seq_lengths),
    }
    want = 0.25 * (torch.tensor(factors, dtype=torch.float64)[items[bound.item]] * losses).sum()
    assert relative_error(loss, want) < 1e-12
    for got, true in zip((hidden.grad, weight.grad), torch.autograd.grad(want, leaves), strict=True):
        assert relative_error(got, true) < 1e-9
