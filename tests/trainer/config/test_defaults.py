"""Defaults that follow from what is trained."""

from __future__ import annotations

from typing import Any

import pytest

from madpo.trainer.config.schema import dump, from_tree
from madpo.trainer.config.strict_yaml import parse

NEEDED: dict[str, Any] = {
    "output_dir": "o",
    "model": {"model_name_or_path": "m"},
    "data": {"dataset_name": "d"},
}
ADAPTER: dict[str, Any] = {"peft": {}}


@pytest.mark.parametrize(
    ("task", "sections", "rate", "epochs"),
    [
        ("train", {"objective": {"loss_type": "dpo"}}, 1e-6, 1.0),
        ("train", {"objective": {"loss_type": "sigmoid"}, **ADAPTER}, 1e-5, 1.0),
        ("train", {"objective": {"loss_type": ["sigmoid", "bco_pair"]}}, 1e-6, 1.0),
        ("train", {"objective": {"loss_type": "kto"}}, 1e-6, 1.0),
        ("train", {"objective": {"loss_type": "dft"}}, 2e-5, 2.0),
        ("train", {"objective": "nll"}, 2e-5, 2.0),
        ("sft", {}, 2e-5, 2.0),
        ("sft", {"peft": {"lora_r": 8}}, 2e-4, 2.0),
        ("reward", {}, 1e-5, 1.0),
        ("reward", {"peft": {}}, 1e-4, 1.0),
        ("sft", {"optim": {"lr": 0.5}, "train": {"num_train_epochs": 7.0}}, 0.5, 7.0),
        ("sft", {"optim": {"weight_decay": 0.1}, "train": {"max_steps": 3}}, 2e-5, 2.0),
    ],
)
def test_rate_and_epochs_are_those_of_what_is_trained(task, sections, rate, epochs):
    config = from_tree({**NEEDED, **sections}, "here", task)
    assert (config.optim.lr, config.train.num_train_epochs) == (rate, epochs)
    assert from_tree(parse(dump(config), "dump"), "dump") == config


def test_a_stored_adapter_has_the_rate_of_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    config = from_tree({**NEEDED, "model": {"model_name_or_path": str(tmp_path)}}, "here", "reward")
    assert config.optim.lr == 1e-4


@pytest.mark.parametrize(
    "objective", [None, "none of them", 3, {"loss_type": "none of them"}, {"loss_type": 3}, {}]
)
def test_an_objective_that_the_schema_refuses_gets_there(objective):
    with pytest.raises(ValueError, match="objective"):
        from_tree({**NEEDED, "objective": objective}, "here")
