"""Objectives of the global batch and of single completions, by independent arithmetic in numpy."""

import math

import numpy as np
import pytest
import torch

from madpo.trainer.objectives import BatchState, EdgeScores, SequenceScores, build
from madpo.trainer.objectives.base import Item
from madpo.trainer.objectives.registry import OBJECTIVES

E = 12
PAIRED = [
    name
    for name, entry in OBJECTIVES.items()
    if entry.item is Item.EDGE and entry.of(entry.params()).needs_batch and name != "weighted_sum"
]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


@pytest.fixture
def edges() -> EdgeScores:
    logps = -20 + 4 * torch.randn(4, E, dtype=torch.float64)
    logps[:2].requires_grad_()
    lengths = torch.randint(3, 20, (2, E))
    won, lost = (x.clone().requires_grad_() for x in logps[:2].detach())
    return EdgeScores(won, lost, logps[2].detach(), logps[3].detach(), *lengths)


def arrays(scores: EdgeScores):
    """(a, b, u_w, u_l, n_w, n_l) as numpy."""
    won, lost, ref_won, ref_lost, n_w, n_l = (
        getattr(scores, name).detach().numpy() for name in list(scores.__dataclass_fields__)[:6]
    )
    return won - ref_won, lost - ref_lost, won / n_w, lost / n_l, n_w, n_l


def dloss_dlogps(losses: torch.Tensor, scores: EdgeScores) -> np.ndarray:
    """(E,) d(sum of losses) / d(log-prob of the chosen completion)."""
    return torch.autograd.grad(losses.sum(), scores.chosen_logps, retain_graph=True)[0].numpy()


def test_beta_dpo(edges):
    """Two steps: moments, draw, beta, losses; the gradient treats all of them as constants."""
    objective, memory = build("beta_dpo", alpha=0.3), {}
    a, b, *_ = arrays(edges)
    gaps, mean, std = a - b, 0.0, 0.0
    for step in range(2):
        outcome = objective.outcome(edges, BatchState(memory, (7, step)))
        mean, std = 0.9 * mean + 0.1 * gaps.mean(), 0.9 * std + 0.1 * gaps.std(ddof=1)
        assert outcome.memory["moments"] == pytest.approx([mean, std])
        kept = outcome.stats["beta_dpo/kept"].numpy() == 1
        assert kept.sum() == int(E * 0.8)
        beta = max(0.1 * (1 + 0.3 * (gaps[kept].mean() - mean)), 1e-3)
        np.testing.assert_allclose(outcome.stats["beta_dpo/beta"], beta)
        want = np.where(kept, softplus(-beta * gaps), 0)
        np.testing.assert_allclose(outcome.losses.detach(), want, rtol=1e-12)
        want = np.where(kept, -beta * sigmoid(-beta * gaps), 0)
        np.testing.assert_allclose(dloss_dlogps(outcome.losses, edges), want)
        memory = outcome.memory


def test_beta_dpo_draws_by_the_gaussian_and_by_the_seed_alone():
    """Nine gaps near the running mean and one two deviations away, of which eight are kept."""
    gaps = torch.tensor([0.1 * i for i in range(9)] + [4.4], dtype=torch.float64)
    zero = torch.zeros_like(gaps)
    scores = EdgeScores(gaps, zero, zero, zero)
    objective = build("beta_dpo", momentum=0.999)
    memory = {"moments": [0.4, 2.0]}

    def kept(seed):
        return objective.outcome(scores, BatchState(memory, seed)).stats["beta_dpo/kept"].numpy()

    assert (kept((1, 5)) == kept((1, 5))).all()
    draws = np.stack([kept((1, step)) for step in range(400)])
    assert len(np.unique(draws, axis=0)) > 30
    of_another_run = np.stack([kept((2, step)) for step in range(400)])
    assert (draws == of_another_run).all(1).mean() < 0.2
    near, far = draws[:, :9].mean(), draws[:, 9].mean()
    assert far < near - 0.2
    # Drawing without replacement in proportion to weights, by brute force.
    weights = np.exp(-0.5 * ((gaps.numpy() - 0.4) / 2.0) ** 2)
    random = np.random.default_rng(0)
    brute = [9 in random.choice(10, 8, replace=False, p=weights / weights.sum()) for _ in range(4000)]
    assert far == pytest.approx(np.mean(brute), abs=4 * math.sqrt(0.25 / 400))


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("count", [1, 3])
def test_the_first_step_of_a_policy_that_is_its_reference_is_finite(name, count):
    """All gaps are equal, and their deviation is 0."""
    logps = torch.full((count,), -5.0, dtype=torch.float64, requires_grad=True)
    fixed, lengths = logps.detach(), torch.full((count,), 4)
    losses = build(name)(EdgeScores(logps, fixed, fixed, fixed, lengths, lengths))
    losses.sum().backward()
    assert losses.isfinite().all() and logps.grad is not None and logps.grad.isfinite().all()


def test_alpha_dpo(edges):
    a, b, u_w, u_l, n_w, n_l = arrays(edges)
    gaps = a / n_w - b / n_l
    mean, std = 0.1 * gaps.mean(), 0.1 * gaps.std(ddof=1)
    outcome = build("alpha_dpo", beta=2.0, gamma=0.5, alpha=0.2).outcome(edges)
    z = 2 * (u_w - u_l) - 0.5 - 2 * 0.2 * (gaps - mean) / std
    np.testing.assert_allclose(outcome.losses.detach(), softplus(-z), rtol=1e-12)
    np.testing.assert_allclose(dloss_dlogps(outcome.losses, edges), -2 * sigmoid(-z) / n_w)
    assert outcome.memory["moments"] == pytest.approx([mean, std])
    simpo = build("simpo", beta=2.0, gamma=0.5)(edges)
    torch.testing.assert_close(build("alpha_dpo", beta=2.0, gamma=0.5, alpha=0.0)(edges), simpo)


def test_amapo(edges):
    _, _, u_w, u_l, n_w, _ = arrays(edges)
    gaps = u_w - u_l
    mean, std = gaps.mean(), gaps.std(ddof=1)
    margins = np.where(gaps < mean, 2.0 * np.exp((mean - gaps) / std * mean), 0)
    assert (margins == 0).any() and (margins > 0).any()
    losses = build("amapo")(edges)
    np.testing.assert_allclose(losses.detach(), softplus(margins - 2 * gaps), rtol=1e-12)
    np.testing.assert_allclose(dloss_dlogps(losses, edges), -2 * sigmoid(margins - 2 * gaps) / n_w)


def test_dr_dpo(edges):
    """The mean over pairs is the loss of the step; its gradients are DPO's, weighted by a softmax of -L."""
    a, b, *_ = arrays(edges)
    plain = softplus(-0.1 * (a - b))
    losses = build("dr_dpo", beta_prime=0.5)(edges)
    np.testing.assert_allclose(losses.mean().item(), -0.5 * np.log(np.mean(np.exp(-plain / 0.5))), rtol=1e-12)
    weights = np.exp(-plain / 0.5)
    want = -0.1 * sigmoid(-0.1 * (a - b)) * weights / weights.sum()
    np.testing.assert_allclose(dloss_dlogps(losses, edges) / E, want)
    large = build("dr_dpo", beta_prime=1e7)(edges)
    assert large.mean().item() == pytest.approx(plain.mean(), rel=1e-6)


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_aot(edges, e):
    a, b, *_ = arrays(edges)
    won, lost = edges.chosen_logps.detach().numpy(), edges.rejected_logps.detach().numpy()
    ref = edges.ref_chosen_logps.numpy() - edges.ref_rejected_logps.numpy()
    paired = 0.3 * (np.sort(won - lost) - np.sort(ref))
    unpaired = 0.3 * (np.sort(a) - np.sort(b))
    for name, z in (("aot", paired), ("aot_unpaired", unpaired)):
        losses = build(name, beta=0.3, label_smoothing=e)(edges)
        want = (1 - e) * softplus(-z) + e * softplus(z)
        np.testing.assert_allclose(losses.detach(), want, rtol=1e-12)
    # A gradient belongs to the edge that has the rank, not to the position of the rank.
    rank = np.argsort(np.argsort(a))
    z = unpaired[rank]
    want = 0.3 * (e * sigmoid(z) - (1 - e) * sigmoid(-z))
    np.testing.assert_allclose(
        dloss_dlogps(build("aot_unpaired", beta=0.3, label_smoothing=e)(edges), edges), want
    )


def test_gamma_po(edges):
    """The margins keep their mean and come near the minimum that a fine search finds."""
    *_, u_w, u_l, n_w, _ = arrays(edges)
    z = 2.5 * (u_w - u_l)
    outcome = build("gamma_po", tau=3.0).outcome(edges)
    margins = outcome.stats["gamma_po/margin"].numpy()
    assert margins.mean() == pytest.approx(1.0) and margins.std() > 1e-4
    np.testing.assert_allclose(outcome.losses.detach(), softplus(margins - z), rtol=1e-12)
    np.testing.assert_allclose(dloss_dlogps(outcome.losses, edges), -2.5 * sigmoid(margins - z) / n_w)
    assert outcome.memory["gaps"] == pytest.approx(z)

    def value(g):
        p = g / g.sum()
        return softplus(g - z).mean() + 3.0 * (p * np.log(p * E)).sum()

    assert value(margins) < value(np.ones(E))
    p = np.full(E, 1 / E)
    for _ in range(4000):
        p = p * np.exp(-0.02 * (sigmoid(E * p - z) + 3.0 * (1 + np.log(E * p))))
        p /= p.sum()
    np.testing.assert_allclose(margins, E * p, atol=0.05 * (E * p - 1).std())
    stiff = build("gamma_po", base="dpo", beta=0.1, tau=1e6)(edges)
    torch.testing.assert_close(stiff, build("dpo", beta=0.1)(edges), rtol=1e-5, atol=1e-5)


def test_gamma_po_fills_up_from_its_queue(edges):
    """Earlier gaps move the margins of the present ones, and the queue keeps the newest 2048."""
    objective = build("gamma_po", tau=3.0)
    alone = objective.outcome(edges)
    full = BatchState({"gaps": [float(x) for x in np.linspace(-9, 9, 2040)]}, (0, 1))
    more = objective.outcome(edges, full)
    assert len(more.memory["gaps"]) == 2048 and more.memory["gaps"][-E:] == alone.memory["gaps"]
    assert not torch.allclose(alone.losses, more.losses)
    torch.testing.assert_close(more.losses, objective.outcome(edges, full).losses)


def completions(labels, a) -> SequenceScores:
    logps = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    return SequenceScores(logps, torch.zeros(len(a), dtype=torch.float64), labels=torch.tensor(labels))


def test_kto():
    """Golden values at KL 0.3, from two mismatched completions; none gives way to a negative estimate."""
    scores = completions([1, -1, 0, 0], [0.5, -0.8, 1.0, -0.4])
    outcome = build("kto").outcome(scores)
    assert outcome.losses.tolist() == pytest.approx([0.49500017, 0.4725277, 0, 0], abs=1e-8)
    assert outcome.stats["kto/kl"].tolist() == pytest.approx([0.3] * 4)
    (gradient,) = torch.autograd.grad(outcome.losses.sum(), scores.logps)
    x, y = sigmoid(0.1 * 0.2), sigmoid(0.1 * 1.1)
    assert gradient.tolist() == pytest.approx([-0.1 * x * (1 - x), 0.1 * y * (1 - y), 0, 0])
    weighted = build("kto", desirable_weight=2.0, undesirable_weight=0.5)(scores).tolist()
    assert weighted == pytest.approx([0.99000034, 0.23626385, 0, 0], abs=1e-8)
    negative = build("kto")(completions([1, -1, 0], [0.5, -0.8, -3.0])).tolist()
    assert negative == pytest.approx([1 - sigmoid(0.05), 1 - sigmoid(0.08), 0])


def test_apo_zero_unpaired():
    losses = build("apo_zero_unpaired", undesirable_weight=3.0)(completions([1, -1], [0.5, -0.8])).tolist()
    assert losses == pytest.approx([1 - sigmoid(0.05), 3 * sigmoid(-0.08)])
    assert build("kto").needs == {"reference", "labels", "mismatched", "batch"}
    with pytest.raises(ValueError, match="kto takes SequenceScores, got EdgeScores"):
        build("kto")(EdgeScores(torch.zeros(1), torch.zeros(1)))
    with pytest.raises(ValueError, match="kto needs labels"):
        build("kto")(SequenceScores(torch.zeros(1), torch.zeros(1)))
