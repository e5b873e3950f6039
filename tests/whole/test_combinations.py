"""Features that are each exact are exact together: every pair of choices meets in some run."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
from harness import make_config, run_ranks, save_model, write_pairs
from lora_cases import changed
from plain import compare, plain_steps, zero3_steps

from madpo.trainer.config.schema import Config

pytestmark = pytest.mark.ranks

STEPS = 3
CPU = {"device": "cpu"}
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "objective": {
        "margins": {"objective": {"loss_type": "madpo", "tau": 2.0}},
        "whole batch": {"objective": {"loss_type": "beta_dpo"}},
        "lengths": {"objective": {"loss_type": "ipo"}},
    },
    "slices": {"no": {}, "yes": {"train": {"sequence_parallel_size": 2}}},
    "zero": {
        "3": {},
        "3, offloaded": {"deepspeed": {"offload_param": CPU, "offload_optimizer": CPU}},
        "3, hpZ": {"deepspeed": {"zero_hpz_partition_size": 2}},
        "2": {"deepspeed": {"stage": 2}},
        "2, offloaded": {"deepspeed": {"stage": 2, "offload_optimizer": CPU}},
    },
    "recomputation": {
        "no": {},
        "whole layers": {"model": {"gradient_checkpointing": True}},
        "selective": {"model": {"gradient_checkpointing": "selective"}},
    },
    "activations": {"here": {}, "on the host": {"model": {"activation_offloading": True}}},
    "reference": {"joint": {}, "cached": {"model": {"reference": "cached"}}},
    "prefixes": {"shared": {}, "repeated": {"model": {"prefix_sharing": False}}},
    "micro-batches": {"one": {}, "several": {"train": {"micro_batch_tokens": 100}}},
}

Choice = tuple[tuple[str, str], ...]
"""(what is chosen, and which), of everything in CHOICES."""


def covering() -> list[Choice]:
    """Few choices among which each pair of values is found, the first those of the defaults."""
    every = [
        tuple(zip(CHOICES, values, strict=True)) for values in product(*(CHOICES[name] for name in CHOICES))
    ]
    missing = {pair for choice in every for pair in combinations(choice, 2)}
    found: list[Choice] = []
    while missing:
        best = max(every, key=lambda choice: len(missing.intersection(combinations(choice, 2))))
        missing.difference_update(combinations(best, 2))
        found.append(best)
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory, tokenizer_folder) -> Config:
    folder = tmp_path_factory.mktemp("combinations")
    names = {
        key: str(save_model(folder / key, tokenizer_folder, seed, tied=True))
        for seed, key in enumerate(("model_name_or_path", "ref_model_name_or_path"))
    }
    return make_config(
        folder,
        {
            "model": names,
            "data": {"dataset_name": str(write_pairs(folder / "pairs.jsonl", 24)), "max_length": 48},
            "objective": {"loss_type": "dpo"},
            "optim": {"lr": 1e-3, "weight_decay": 0.01},
            "train": {"global_batch_size": 6, "export": False},
        },
    )


def chosen(config: Config, choice: Choice) -> Config:
    for name, value in choice:
        sections = dict(CHOICES[name][value])
        if "deepspeed" in sections:
            zero = {**config.deepspeed["zero_optimization"], **sections["deepspeed"]}
            sections["deepspeed"] = {"zero_optimization": zero}
        config = changed(config, **sections)
    return config


def all_steps(shard, configs: list[Config]) -> list[Any]:
    return [zero3_steps(shard, config, STEPS) for config in configs]


def first_with_every_choice(choices: list[Choice]) -> list[Choice]:
    """The beginning of the list in which every choice is made at least once."""
    missing = {choice for chosen in choices for choice in chosen}
    for number, chosen in enumerate(choices, 1):
        missing.difference_update(chosen)
        if not missing:
            return choices[:number]
    raise AssertionError


@pytest.mark.parametrize(
    "pairs", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["every choice", "every pair"]
)
def test_choices_together_compute_what_plain_pytorch_does(config, pairs):
    choices = covering() if pairs else first_with_every_choice(covering())
    configs = [chosen(config, choice) for choice in choices]
    want = {one.objective.loss_type: plain_steps(one, STEPS) for one in configs}
    got = run_ranks(4, all_steps, configs)[0]
    for choice, one, steps in zip(choices, configs, got, strict=True):
        try:
            compare(steps, want[one.objective.loss_type])
        except AssertionError as error:
            raise AssertionError(f"{dict(choice)}: {error}") from None
