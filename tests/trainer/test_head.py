"""Every objective through the head: the loss of the whole batch, and the gradient of plain autograd."""

import dataclasses
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from facts import Facts
from kernel_cases import relative_error
from odd_settings import CASES, ODD, keys, numeric_gradients, opinion
from torch import nn

from madpo.kernels.token_scores import TokenScores
from madpo.trainer.batches.packing import pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.head import OutputHead, PreferenceHead
from madpo.trainer.objectives import build
from madpo.trainer.objectives.base import OBJECTIVES, Item, Params, objective
from madpo.trainer.objectives.build import BoundObjective
from madpo.trainer.objectives.scores import EdgeScores

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
            dataclasses.replace(group, weights=[weight])
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


class ScaledParams(Params):
    loss_type: Literal["scaled_by_its_margin"] = "scaled_by_its_margin"
    beta: float = 0.3


@BUDGETS
def test_weights_that_come_with_the_pairs(rows):
    """An objective whose weight the kernels do not form, of somebody's own: it gets each pair's own weight,
    also of a chunk that is not the first."""

    @objective(ScaledParams, {"reference", "margins"}, weight=lambda margins, params: margins.abs())
    def scaled(scores: EdgeScores, params: ScaledParams):
        assert scores.margins is not None
        weights = scores.margins.abs() if scores.weights is None else scores.weights
        return -weights * F.logsigmoid(params.beta * scores.deltas)

    bound = BoundObjective(OBJECTIVES.pop("scaled_by_its_margin"), ScaledParams())
    for weights in ((), (0.7, 2.5, 0.1, 1.3)):
        batch = batch_of(Item.EDGE, weights=weights)
        hidden, weight, ref_hidden, ref_weight = states(batch)
        args = OutputHead(weight), OutputHead(ref_weight), bound, rows * 64 * 8
        loss, *_ = PreferenceHead(*args)(hidden, ref_hidden, batch)
        loss.backward()
        leaves = hidden.detach().requires_grad_(), weight.detach().clone().requires_grad_()
        tokens, ref, *_ = plain_rows(batch, *leaves, ref_hidden, ref_weight)
        ratios = torch.stack([part.sum() for part in (tokens - ref).split(list(batch.lengths))])
        factors = torch.tensor(weights or np.abs(MARGINS), dtype=torch.float64)
        want = 0.25 * (factors * F.softplus(-0.3 * (ratios[0::2] - ratios[1::2]))).sum()
        assert relative_error(loss, want) < 1e-12
        for got, true in zip((hidden.grad, weight.grad), torch.autograd.grad(want, leaves), strict=True):
            assert relative_error(got, true) < 1e-9
