"""Every objective through the head: the loss of the whole batch, and the gradient of plain autograd."""

import dataclasses

import pytest
import torch
from kernel_cases import relative_error
from torch import nn

from madpo.kernels.token_scores import TokenScores
from madpo.trainer.data.packing import pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.head import OutputHead, PreferenceHead
from madpo.trainer.objectives.base import Item
from madpo.trainer.objectives.build import bind
from madpo.trainer.objectives.registry import OBJECTIVES

H, V = 12, 61
ONE_BATCH = [name for name, entry in OBJECTIVES.items() if not entry.of(entry.params()).needs_batch]
LENGTHS = ((3, 4), (1, 6), (5, 2), (2, 2))


def batch_of(item: Item):
    def draw(count):
        return torch.randint(0, V, (count,)).tolist()

    groups = [
        TokenGroup(draw(4), [draw(n) for n in lengths], [(0, 1, margin)])
        for lengths, margin in zip(LENGTHS, (0.4, 9.0, 2.0, 0.1), strict=True)
    ]
    if item is Item.TOKEN:
        groups = [TokenGroup(group.prompt, group.completions[:1], []) for group in groups]
    if item is Item.SEQUENCE:
        groups = [TokenGroup(group.prompt, group.completions, [], [1, -1]) for group in groups]
    return dataclasses.replace(pack(groups), scale=0.25)


@pytest.mark.parametrize("rows", [1000, 9], ids=["one-wave", "waves-and-slabs"])
@pytest.mark.parametrize("name", ONE_BATCH)
def test_every_objective_through_the_head(name, rows):
    entry = bind(OBJECTIVES[name].params())
    batch = batch_of(entry.item)
    hidden, ref_hidden = torch.randn(2, len(batch.targets), H, dtype=torch.float64)
    weight, ref_weight = (nn.Parameter(torch.randn(V, H, dtype=torch.float64) * 0.4) for _ in range(2))
    ref_weight.requires_grad_(False)
    reference = OutputHead(ref_weight) if entry.needs_reference else None
    head = PreferenceHead(OutputHead(weight), reference, entry, rows * 64 * 8)
    leaf = hidden.clone().requires_grad_()
    loss, logps, ref_logps, *_ = head(leaf, ref_hidden if entry.needs_reference else None, batch)
    loss.backward()

    def distributions(h, w):
        return (h @ w.T).log_softmax(-1)

    def of_targets(logps):
        return logps.gather(1, batch.targets[:, None])[:, 0]

    plain, plain_weight = hidden.clone().requires_grad_(), weight.detach().clone().requires_grad_()
    policy, other = distributions(plain, plain_weight), distributions(ref_hidden, ref_weight)
    ref = of_targets(other) if entry.needs_reference else None
    collisions = policy.detach().exp().square().sum(1).log()
    kl = (other.exp() * (other - policy)).sum(1)
    scored = batch.scored(TokenScores(of_targets(policy), ref, collisions, kl))
    want = 0.25 * entry.of_groups(scored).losses.sum()
    want.backward()
    assert relative_error(loss, want) < 1e-12
    assert relative_error(logps, scored.token_logps) < 1e-12
    assert (ref_logps is None) == (ref is None)
    assert relative_error(leaf.grad, plain.grad) < 1e-9
    assert relative_error(weight.grad, plain_weight.grad) < 1e-9
