"""Configs of other trainers become ours: recipes with the keys of published ones, and each loss by itself."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import command

from madpo.launch.convert.command import run
from madpo.launch.convert.convert import PEERS, convert
from madpo.launch.convert.draft import FILL_IN, Draft, Fate
from madpo.launch.convert.write import tree_of, yaml_text
from madpo.trainer.config import strict_yaml
from madpo.trainer.config.schema import from_tree
from madpo.trainer.errors import UserError

RECIPES = sorted((Path(__file__).parent / "recipes").iterdir())


@pytest.fixture(scope="module")
def drafts() -> dict[str, Draft]:
    return {path.name: convert(path, gpus=8) for path in RECIPES}


def converted(folder: Path, keys: dict[str, Any], **options: Any) -> Draft:
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(keys))
    return convert(path, **{"gpus": 1, **options})


@pytest.mark.parametrize("name", [path.name for path in RECIPES])
def test_a_recipe_becomes_a_config_that_the_schema_accepts(drafts, name):
    draft = drafts[name]
    text = yaml_text(draft, name)
    assert strict_yaml.parse(text, name) == tree_of(draft)
    config = from_tree(tree_of(draft), name)
    assert config.train.global_batch_size == draft.config["train.global_batch_size"]


@pytest.mark.parametrize("name", [path.name for path in RECIPES])
def test_no_key_of_a_recipe_is_dropped_without_a_word(drafts, name):
    draft = drafts[name]
    assert draft.verdicts.keys() == {key for key, value in draft.given.items() if value is not None}
    silent = [key for key, (fate, why) in draft.verdicts.items() if fate is Fate.LOST and not why]
    silent += [key for key, (fate, why) in draft.verdicts.items() if fate is Fate.CHANGED and not why]
    assert not silent


def test_nine_of_ten_keys_of_published_recipes_come_over(drafts):
    assert len(drafts) >= 20 and {draft.peer for draft in drafts.values()} == {x.name for x in PEERS.values()}
    keys = sum(len(draft.verdicts) for draft in drafts.values())
    done = sum(draft.count(Fate.TAKEN, Fate.CHANGED) for draft in drafts.values())
    same = sum(draft.count(Fate.TAKEN) for draft in drafts.values())
    assert done / keys >= 0.9 and same / keys >= 0.8, (keys, done, same)
    assert not sum(draft.count(Fate.UNKNOWN) for draft in drafts.values())


EXPECTED: dict[str, dict[str, Any]] = {
    "zephyr_dpo_qlora.yaml": {
        "model.model_name_or_path": "alignment-handbook/zephyr-7b-sft-qlora",
        "peft.lora_r": 128,
        "peft.load_in_4bit": True,
        "deepspeed.zero_optimization.stage": 2,
        "data.dataset_name": "HuggingFaceH4/ultrafeedback_binarized",
        "data.dataset_train_split": "train_prefs",
        "data.dataset_test_split": "test_prefs",
        "objective.loss_type": "dpo",
        "objective.beta": 0.01,
        "optim.lr": 5e-6,
        "optim.warmup_ratio": 0.1,
        "train.global_batch_size": 4 * 4 * 8,
        "train.micro_batch_tokens": 4 * 2 * 1024,
        "train.eval_steps": 100,
    },
    "zephyr_orpo.yaml": {"objective.loss_type": "orpo", "objective.lambda": 0.05, "optim.warmup_steps": 100},
    "llama3_simpo.yaml": {
        "objective.loss_type": "simpo",
        "objective.beta": 2.0,
        "objective.gamma": 1.0,
        "train.global_batch_size": 2 * 16 * 8,
    },
    "tulu3_dpo.yaml": {
        "objective.loss_type": "sigmoid_norm",
        "objective.beta": 5.0,
        "optim.lr_scheduler_type": "linear",
        "train.save_steps": 1000,
    },
    "smollm3_dpo_apo.yaml": {
        "objective.loss_type": "apo_zero",
        "optim.max_grad_norm": 0.2,
        "data.datasets": [
            {
                "path": "HuggingFaceTB/smoltalk2",
                "name": "Preference",
                "split": "llama_3.1_tulu_3_8b_preference_mixture_no_think",
                "fraction": 0.5,
            },
            {
                "path": "HuggingFaceTB/smoltalk2",
                "name": "Preference",
                "split": "tulu_3_8b_pref_mix_Qwen3_32B_Qwen3_0.6B_think",
                "fraction": 0.25,
            },
        ],
    },
    "factory_lora_dpo.yaml": {
        "peft.lora_r": 8,
        "peft.lora_alpha": 16,  # twice the rank, as nothing is said
        "peft.lora_target_modules": "all-linear",
        "data.max_length": 2048,
        "objective.loss_type": "dpo",
        "train.num_train_epochs": 3.0,
    },
    "factory_full_sft.yaml": {"objective.loss_type": "nll", "deepspeed.zero_optimization": {"stage": 3}},
    "axolotl_qlora_kto.yaml": {
        "data.adapter": "kto",
        "peft.use_bnb_nested_quant": True,
        "objective.loss_type": "kto",
        "objective.beta": 0.5,
        "objective.desirable_weight": 0.2,
        "objective.undesirable_weight": 1.0,
        "peft.lora_target_modules": "all-linear",
    },
    "axolotl_lora_dpo.yaml": {"data.columns": {"prompt": "conversation"}, "peft.load_in_8bit": True},
    "axolotl_reward.yaml": {"objective.loss_type": "bradley_terry"},
    "openrlhf_dpo.sh": {
        "objective.loss_type": "dpo",
        "optim.lr": 5e-7,
        "optim.adam_beta2": 0.95,
        "train.global_batch_size": 256,
        "deepspeed.zero_optimization.stage": 3,
    },
    "openrlhf_rm.sh": {"output_dir": "./checkpoint/llama3-8b-rm", "train.bf16": True, "optim.lr": 9e-6},
    "openrlhf_sft_lora.sh": {
        "data.columns": {"prompt": "question", "completion": "response"},
        "model.router_aux_loss_coef": 0.001,
        "peft.lora_r": 64,
    },
    "trl_kto.sh": {
        "train.global_batch_size": 16 * 8,
        "data.order": "as_is",
        "data.dataset_test_split": "test",
        "optim.warmup_ratio": 0.1,
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_values_of_recipes(drafts, name):
    config = drafts[name].config
    assert {key: config.get(key) for key in EXPECTED[name]} == EXPECTED[name]


LOSSES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"loss_type": "dpo", "beta": 0.1}),
    ({"label_smoothing": 0.2}, {"loss_type": "cdpo", "beta": 0.1, "label_smoothing": 0.2}),
    ({"loss_type": "robust"}, {"loss_type": "robust", "beta": 0.1, "label_smoothing": 0.0}),
    ({"loss_type": "exo_pair", "label_smoothing": 0.01}, {"loss_type": "exo_pair", "beta": 0.1, "eps": 0.01}),
    ({"loss_type": "discopop"}, {"loss_type": "discopop", "beta": 0.1, "tau": 0.05}),
    ({"loss_type": "aot_pair"}, {"loss_type": "aot", "beta": 0.1, "label_smoothing": 0.0}),
    ({"rpo_alpha": 0.5}, {"loss_type": "dpo_nll", "beta": 0.1, "alpha": 0.5}),
    ({"ld_alpha": 0.3}, {"loss_type": "ld_dpo", "beta": 0.1, "alpha": 0.3}),
    ({"use_weighting": True}, {"loss_type": "wpo", "beta": 0.1, "clamp": False}),
    (
        {"f_divergence_type": "js_divergence"},
        {"loss_type": "f_dpo", "beta": 0.1, "divergence": "js"},
    ),
    (
        {"loss_type": "ipo", "rpo_alpha": 1.0},
        {
            "loss_type": "weighted_sum",
            "terms": [{"loss_type": "ipo", "beta": 0.1}, {"loss_type": "chosen_nll"}],
            "loss_weights": [1.0, 1.0],
        },
    ),
]


@pytest.mark.parametrize(("keys", "objective"), LOSSES)
def test_a_key_that_changes_dpos_loss_chooses_another_objective(keys, objective, tmp_path):
    draft = converted(tmp_path, {"beta": 0.1, **keys}, task="dpo")
    assert tree_of(draft)["objective"] == objective
    from_tree(tree_of(draft), "converted")


OTHERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("cpo", {"cpo_alpha": 0.5}, {"loss_type": "cpo", "beta": 0.1, "alpha": 0.5}),
    (
        "cpo",
        {"loss_type": "simpo", "simpo_gamma": 1.6, "cpo_alpha": 0.0},
        {"loss_type": "simpo", "beta": 0.1, "gamma": 1.6},
    ),
    (
        "cpo",
        {"loss_type": "simpo"},
        {"loss_type": "cpo_simpo", "beta": 0.1, "gamma": 0.5, "alpha": 1.0},
    ),
    ("sft", {"loss_type": "dft"}, {"loss_type": "dft"}),
    (
        "reward",
        {"center_rewards_coefficient": 0.01},
        {"loss_type": "bradley_terry", "center_rewards_coefficient": 0.01},
    ),
]


@pytest.mark.parametrize(("task", "keys", "objective"), OTHERS)
def test_other_tasks_have_their_own_losses(task, keys, objective, tmp_path):
    assert tree_of(converted(tmp_path, keys, task=task, peer="trl"))["objective"] == objective


@pytest.mark.parametrize(
    ("keys", "objective"),
    [
        ({"pref_loss": "simpo", "pref_beta": 2.0}, {"loss_type": "simpo", "beta": 2.0, "gamma": 0.5}),
        ({"pref_loss": "orpo"}, {"loss_type": "orpo", "lambda": 0.1}),
        ({"pref_ftx": 0.2}, {"loss_type": "dpo_nll", "beta": 0.1, "alpha": 0.2}),
        ({"pref_loss": "kto_pair"}, {"loss_type": FILL_IN}),
    ],
)
def test_losses_of_llama_factory(keys, objective, tmp_path):
    assert tree_of(converted(tmp_path, {"stage": "dpo", **keys}))["objective"] == objective


def test_a_loss_without_counterpart_starts_no_run(tmp_path):
    draft = converted(tmp_path, {"loss_type": "hinge"}, task="cpo", peer="trl")
    assert any("hinge of CPOTrainer has no counterpart" in note for note in draft.by_hand)
    with pytest.raises(UserError, match=f"unknown objective '{FILL_IN}'"):
        from_tree(tree_of(draft), "converted")


@pytest.mark.parametrize(
    ("keys", "config"),
    [
        ({}, {"optim.lr_scheduler_type": "linear", "train.num_train_epochs": 3.0, "optim.lr": 1e-6}),
        ({"max_steps": 50}, {"train.max_steps": 50, "train.num_train_epochs": None}),
        ({"lr_scheduler_type": "constant", "warmup_ratio": 0.1}, {"optim.warmup_ratio": None}),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 7, "warmup_ratio": 0.1},
            {"optim.lr_scheduler_type": "constant", "optim.warmup_steps": 7, "optim.warmup_ratio": None},
        ),
        ({"fp16": True}, {"train.bf16": True}),
        ({"bf16": False}, {"train.bf16": False}),
        ({"precompute_ref_log_probs": True}, {"model.reference": "cached"}),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "overlap_comm": "auto"}, "bf16": "auto"}},
            {"deepspeed.zero_optimization": {"stage": 2}},
        ),
    ],
)
def test_keys_that_say_something_together(keys, config, tmp_path):
    draft = converted(tmp_path, {"beta": 0.1, **keys}, task="dpo")
    assert {key: draft.config.get(key) for key in config} == config
    from_tree(tree_of(draft), "converted")


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        ({"beta": 0.1}, {"gpus": None}, "--gpus: train.global_batch_size is per_device_train_batch_size 8 x"),
        ({"stage": "ppo"}, {}, "stage: ppo: madpo has no on-policy RL"),
        ({"base_model": "x", "rl": "grpo"}, {}, "rl: grpo: madpo has no on-policy RL"),
        ({"learning_rate": 1e-5}, {}, "--task: the file does not say what it trains"),
        ({"colour": "red"}, {}, "has no key of another trainer"),
        ({"model": {}, "data": {}}, {}, "is a config of madpo"),
        ({"beta": 0.1}, {"peer": "torchtune"}, "--from torchtune: choose from trl, llamafactory"),
        ({"beta": 0.1}, {"task": "ppo"}, "--task ppo: choose from sft, reward"),
        (["beta"], {}, "a config is a mapping of keys, got list"),
    ],
)
def test_what_cannot_be_converted_is_said(keys, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        converted(tmp_path, keys, **options)


def test_the_command_writes_a_config_and_lists_the_rest(tmp_path):
    theirs, ours = tmp_path / "dpo.yaml", tmp_path / "ours.yaml"
    theirs.write_text("beta: 0.2\nreport_to: wandb\nweather: fine\n")
    status, out, said = command("convert", str(theirs), "-o", str(ours), "--gpus", "4")
    assert (status, out) == (0, "") and "  # per_device_train_batch_size" not in said
    assert 'not done here:\n  report_to: "wandb"  (metrics are in metrics.jsonl' in said
    assert 'unknown, not read:\n  weather: "fine"\n' in said
    assert said.endswith(f"next: madpo train {ours}\n")
    assert strict_yaml.read(ours)["train"]["global_batch_size"] == 8 * 1 * 4
    assert command("convert", str(theirs), "-o", str(ours), "--gpus", "4")[0] == 2, "nothing is overwritten"
    status, out, said = command("convert", str(theirs), "--gpus", "4")
    assert status == 0 and out == ours.read_text() and 'weather: "fine"' in said
    screen = Terminal()
    with redirect_stdout(screen), redirect_stderr(screen):
        run(theirs, None, None, None, 4)
    assert screen.getvalue().count('weather: "fine"') == 1, "the list is on the screen once"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True
