"""Key names of other trainers: each has a key that is there, or a reason; and the error says it."""

import pytest

from madpo.trainer.config.effects import keys
from madpo.trainer.config.foreign_keys import AS_VALUES, IN_SECTIONS, RENAMED, REPLACED, our_key
from madpo.trainer.config.schema import Config, from_tree
from madpo.trainer.errors import UserError
from madpo.trainer.objectives.registry import OBJECTIVES

PARAMETERS = {
    field.serialization_alias or name
    for entry in OBJECTIVES.values()
    for name, field in entry.params.model_fields.items()
} | {"loss_weights"}


def test_every_key_that_is_named_is_there():
    ours = [*RENAMED.values(), *IN_SECTIONS.values(), *AS_VALUES.values()]
    named = {part for key in ours for part in key.split(" and ")}
    named |= {part for text in REPLACED.values() for part in text.split() if part.count(".") == 1}
    for key in {key.strip(":;,.") for key in named}:
        section, _, name = key.partition(".")
        if section == "objective":
            assert name in PARAMETERS, key
        elif section not in ("deepspeed", "metrics"):
            assert key in keys(), key
    assert not RENAMED.keys() & REPLACED.keys() and not IN_SECTIONS.keys() & (keys().keys() | REPLACED.keys())


def test_a_key_without_its_section_is_found_where_it_is():
    assert our_key("bf16", Config) == "train.bf16"
    assert our_key("lora_r", Config) == "peft.lora_r"
    assert our_key("models", Config) is None, "two sections have it"


WHOLE = {
    "output_dir": "runs/x",
    "model": {"model_name_or_path": "base"},
    "data": {"dataset_name": "pairs.jsonl"},
    "objective": {"loss_type": "dpo"},
}


@pytest.mark.parametrize(
    ("section", "name", "advice"),
    [
        ("optim", "learning_rate", "it is optim.lr here"),
        ("train", "learning_rate", "it is optim.lr here"),
        ("train", "gradient_accumulation_steps", "train.global_batch_size counts prompts over all ranks"),
        ("optim", "bf16", "it is train.bf16 here"),
        ("data", "max_prompt_length", "data.max_length bounds a prompt with its completion"),
        ("model", "attn_implementation", "it is model.attention here"),
        ("objective", "simpo_gamma", "it is objective.gamma here"),
        ("optim", "optim", "AdamW is the only optimiser"),
        ("peft", "r", "it is peft.lora_r here"),
    ],
)
def test_the_error_for_a_foreign_key_says_what_it_is_here(section, name, advice):
    tree = {**WHOLE, section: {**WHOLE.get(section, {}), name: 1}}
    with pytest.raises(UserError) as error:
        from_tree(tree, "c.yaml")
    assert f"{section}.{name}: unknown key" in str(error.value) and advice in str(error.value)


def test_a_key_that_stands_where_it_belongs_is_not_sent_there():
    """DPO has no label_smoothing; other objectives do."""
    with pytest.raises(UserError) as error:
        from_tree({**WHOLE, "objective": {"loss_type": "dpo", "label_smoothing": 0.1}}, "c.yaml")
    assert "objective.label_smoothing: unknown key" in str(error.value) and "it is" not in str(error.value)


def test_a_file_of_another_trainer_is_told_how_to_become_one_of_ours():
    flat = {
        "learning_rate": 1e-5,
        "num_train_epochs": 1,
        "beta": 0.1,
        "report_to": "wandb",
        "output_dir": "x",
    }
    with pytest.raises(UserError) as error:
        from_tree(flat, "trl.yaml")
    first, *lines = str(error.value).splitlines()
    assert first.startswith("trl.yaml: ") and first.endswith(
        "madpo convert FILE translates another trainer's config"
    )
    assert "  learning_rate: unknown key; it is optim.lr here" in lines
    assert "  num_train_epochs: unknown key; it is train.num_train_epochs here" in lines
    with pytest.raises(UserError) as error:
        from_tree({**WHOLE, "learning_rate": 1.0, "beta": 1.0}, "c.yaml")
    assert "madpo convert" not in str(error.value), "two are a slip"


@pytest.mark.parametrize(
    ("section", "value", "advice"),
    [
        ("model", "/models/llama", "write model.model_name_or_path=/models/llama"),
        ("data", "pairs.jsonl", "write data.dataset_name=pairs.jsonl"),
        ("deepspeed", "ds.json", "write the keys of ds.json below it"),
        ("peft", "lora", "peft={} trains an adapter"),
    ],
)
def test_a_text_in_place_of_a_section_is_told_where_it_belongs(section, value, advice):
    with pytest.raises(UserError, match=f"^c.yaml: {section}: expected .*; {advice}"):
        from_tree({**WHOLE, section: value}, "c.yaml")
