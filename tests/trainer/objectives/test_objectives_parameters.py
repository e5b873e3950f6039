"""Every parameter of every objective counts, and the loss is what a second, independent formula says."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from facts import Facts
from odd_settings import CASES, ODD, Settings, example, keys, numeric_gradients, opinion, second_opinion

from madpo.kernels.edge_loss import edge_loss_ref
from madpo.trainer.objectives import BatchState, EdgeScores, Scored, SequenceScores, build
from madpo.trainer.objectives.base import Params, objective
from madpo.trainer.objectives.registry import OBJECTIVES


def scored(x: Facts) -> Scored:
    arrays = (
        x.tokens,
        x.ref_tokens,
        x.lengths,
        x.chosen,
        x.rejected,
        x.margins,
        x.labels,
        x.collisions,
        x.kl,
    )
    return Scored(*map(torch.tensor, arrays))


def outcome(name: str, x: Facts, settings: Settings, of: Scored | None = None) -> Any:
    bound, of = build(name, **keys(name, settings)), of or scored(x)
    view: Any = {EdgeScores: of.edges, SequenceScores: of.sequences}.get(bound.entry.view, of)
    return bound.outcome(view, BatchState(x.memory, x.seed))


def losses(name: str, x: Facts, settings: Settings) -> np.ndarray:
    return outcome(name, x, settings).losses.numpy()


def losses_and_gradients(
    name: str, x: Facts, settings: Settings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The losses, and the gradients (M,) of their sum in each token's log-prob and in each KL."""
    of = scored(x)
    assert of.kl is not None
    leaves = of.token_logps.requires_grad_(), of.kl.requires_grad_()
    losses = outcome(name, x, settings, of).losses
    tokens, kl = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
    return losses.detach().numpy(), tokens.numpy(), kl.numpy()


def fields_of(name: str) -> dict[str, Any]:
    """field -> default"""
    params = OBJECTIVES[name].params()
    return {field: getattr(params, field) for field in type(params).model_fields if field != "loss_type"}


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_has_a_second_opinion_with_every_parameter(name):
    """A new objective, or a new parameter, needs a formula and an odd value."""
    assert name in ODD, f"{name}: no settings in odd_settings.py"
    _, *parameters = inspect.signature(second_opinion(name)).parameters
    assert sorted(parameters) == sorted(fields_of(name))
    for settings in ODD[name]:
        assert settings.keys() == fields_of(name).keys()
    for field, default in fields_of(name).items():
        values = [settings[field] for settings in ODD[name]]
        choice = isinstance(default, (str, bool)) or field == "ablation"
        assert any(value != default for value in values) if choice else default not in values, field


PARAMETERS = [(name, field) for name in sorted(OBJECTIVES) for field in fields_of(name)]


@pytest.mark.parametrize("name, field", PARAMETERS, ids=[".".join(each) for each in PARAMETERS])
def test_the_loss_changes_with_every_parameter(name, field):
    """From its default to an odd value, all others being odd: in some setting, for those that only count
    beside another choice. What only stops a gradient changes that."""
    x, largest = example(name), 0.0
    for settings in ODD[name]:
        others = {key: value for key, value in settings.items() if key != field}
        pairs = zip(*(losses_and_gradients(name, x, these) for these in (settings, others)), strict=True)
        largest = max(largest, *(float(np.abs(odd - default).max()) for odd, default in pairs))
    assert largest > 1e-3


@pytest.mark.parametrize("name, index", CASES)
def test_the_loss_is_what_a_second_formula_says(name, index):
    """At an odd value of every parameter, with what is remembered."""
    x, settings = example(name), ODD[name][index]
    want, memory = opinion(name, x, settings)
    got = outcome(name, x, settings)
    np.testing.assert_allclose(got.losses.numpy(), want, rtol=1e-7, atol=1e-9)
    assert got.memory.keys() == memory.keys()
    for key, values in memory.items():
        np.testing.assert_allclose(got.memory[key], values, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_the_defaults_are_the_documented_ones(name):
    want, _ = opinion(name, example(name), {})
    np.testing.assert_allclose(losses(name, example(name), {}), want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name, index", CASES)
def test_the_gradients_are_what_a_second_formula_says(name, index):
    """In every token's log-prob and in every KL, where what the formula holds constant stays as it is."""
    x, settings = example(name), ODD[name][index]
    _, *got = losses_and_gradients(name, x, settings)
    for ours, want in zip(got, numeric_gradients(name, x, settings), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)


FORMED = [(name, index) for name, index in CASES if OBJECTIVES[name].epilogue]


@pytest.mark.parametrize("name, index", FORMED)
def test_what_the_kernels_form_is_what_the_objective_says(name, index):
    """The objective as data for the kernels, in float64, against the second formula."""
    x, entry = example(name), OBJECTIVES[name]
    of = scored(x)
    for settings in (ODD[name][index], {}):
        bound = build(name, **keys(name, settings))
        assert entry.epilogue is not None
        got = edge_loss_ref(
            of.logps,
            of.ref_logps if "reference" in bound.needs else None,
            of.lengths,
            of.chosen,
            of.rejected,
            entry.epilogue(of.margins, bound.params),
        )
        np.testing.assert_allclose(got.numpy(), opinion(name, x, settings)[0], rtol=1e-9)


WEIGHTED = [(name, index) for name, index in CASES if OBJECTIVES[name].weight]


@pytest.mark.parametrize("name, index", WEIGHTED)
def test_the_loss_is_its_weight_times_what_is_left(name, index):
    """So what has weight 0 need not be computed, and the data may be drawn by weight."""
    x, entry, settings = example(name), OBJECTIVES[name], ODD[name][index]
    of = scored(x)
    bound = build(name, **keys(name, settings))
    assert entry.weight is not None
    weights = entry.weight(of.margins, bound.params)
    others = replace(of.edges, margins=of.margins.flip(0))
    left = bound(others) / entry.weight(of.margins.flip(0), bound.params)
    np.testing.assert_allclose((weights * left).numpy(), opinion(name, x, settings)[0], rtol=1e-9)


class OddNeeds(Params):
    loss_type: Literal["odd_needs"] = "odd_needs"


@pytest.mark.parametrize("needs", [{"margin"}, {"references", "lengths"}])
def test_an_unknown_need_is_refused(needs, monkeypatch):
    """Misspelt, it would be a need of nothing, and the objective would go without."""
    monkeypatch.setattr("madpo.trainer.objectives.base.OBJECTIVES", {})
    with pytest.raises((AssertionError, ValueError)):
        objective(OddNeeds, needs)(lambda scores, params: scores.chosen_logps)
