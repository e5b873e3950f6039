"""Which word a misspelt one is taken for."""

from __future__ import annotations

import pytest

from madpo.trainer.errors import closest, nearest, slips

LOSSES = ["dpo", "ipo", "kto", "madpo", "mixdpo", "orpo", "simpo", "wpo"]


@pytest.mark.parametrize(
    "word, allowed, meant",
    [
        ("MADPO", LOSSES, "madpo"),
        ("madop", LOSSES, "madpo"),
        ("ip0", LOSSES, "ipo"),
        ("ppo", LOSSES, None),
        ("grpo", LOSSES, None),
        ("modle", ["mode", "model", "models"], "model"),
        ("lrr", ["lr", "logging_steps"], "lr"),
        ("split", ["sampling", "order"], None),
        ("logging_dir", ["logging_steps"], None),
        ("zero_optimisation", ["zero_optimization", "aio"], "zero_optimization"),
        ("gradient_checkpoint", ["gradient_checkpointing"], "gradient_checkpointing"),
        ("lora_rank", ["lora_r", "lora_alpha"], "lora_r"),
        ("warmup", ["warmup_steps", "lr"], "warmup_steps"),
        ("warmup", ["warmup_steps", "warmup_ratio"], None),
        ("kto_pair", ["bco_pair", "kto"], None),
        ("", ["a"], None),
        ("x", [], None),
    ],
)
def test_a_slip_is_told_from_another_word(word, allowed, meant):
    assert closest(word, allowed) == meant
    hint = f", did you mean {meant!r}?" if meant else f"; known here: {', '.join(sorted(allowed))}"
    assert nearest(word, allowed) == hint


@pytest.mark.parametrize(
    "a, b, count",
    [("", "", 0), ("ab", "", 2), ("abc", "abc", 0), ("base", "bsae", 1), ("kitten", "sitting", 3)],
)
def test_slips_are_counted_both_ways(a, b, count):
    assert slips(a, b) == slips(b, a) == count
