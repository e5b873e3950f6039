"""Every family of docs/families.md: packed, prefix-shared scores are those of the unmodified model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, packed_logps, plain_logps, tiny_model
from kernel_cases import relative_error

from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.startup.checks import check_head, check_packing

NAME = prefix_sharing.NAMES["sdpa"]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "families.md"


@pytest.fixture(autouse=True)
def _registered():
    prefix_sharing.register()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_the_unmodified_model(family):
    ours, theirs = tiny_model(family, NAME), tiny_model(family, "eager")
    want, got = plain_logps(theirs), packed_logps(ours)
    assert relative_error(got, want) < 1e-5
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    weights = torch.randn(len(want))
    (want * weights).sum().backward()
    (got * weights).sum().backward()
    truth = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert truth[name].grad is not None and truth[name].grad.any(), f"{name} plays no part"
        assert relative_error(parameter.grad, truth[name].grad) < 2e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checks_at_start_pass(family):
    model = tiny_model(family, NAME)
    check_packing(model, torch.device("cpu"))
    check_head(model, torch.device("cpu"))
    assert model.config._attn_implementation == NAME


MATTERS: list[tuple[str, dict[str, Any]]] = [
    ("Llama 3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("Llama 4", {"attention_chunk_size": 1000}),
    ("Llama 4", {"attn_temperature_tuning": False}),
    ("Qwen2.5", {"sliding_window": 1000}),
    ("Gemma 2", {"sliding_window": 1000}),
    ("Gemma 2", {"attn_logit_softcapping": None}),
    ("Gemma 2", {"final_logit_softcapping": None}),
    ("Gemma 3", {"sliding_window": 1000}),
    ("Mistral", {"sliding_window": None}),
    ("Mixtral", {"sliding_window": None}),
    ("Phi-3", {"sliding_window": None}),
    ("gpt-oss", {"sliding_window": 1000}),
    ("SmolLM3", {"no_rope_layers": [1, 1, 1, 1]}),
]


@pytest.mark.parametrize("family, change", MATTERS, ids=[f"{name}-{next(iter(c))}" for name, c in MATTERS])
def test_the_sequences_are_long_enough_for_the_matrix_to_see_it(family, change):
    with torch.no_grad():
        with_it, without = (packed_logps(tiny_model(family, NAME, **values)) for values in ({}, change))
    assert relative_error(without, with_it) > 1e-3


def test_sinks_take_their_share():
    model = tiny_model("gpt-oss", NAME)
    with torch.no_grad():
        before = packed_logps(model)
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-100.0)
        assert relative_error(packed_logps(model), before) > 1e-2


def test_the_documented_table_is_the_matrix():
    lines = DOCUMENT.read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")][1:] == list(FAMILIES)
