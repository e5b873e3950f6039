"""Arguments of TRL's classes are read from a script without running it."""

import pytest

from madpo.launch.convert.convert import convert
from madpo.trainer.errors import UserError

SCRIPT = """
import torch
from trl import DPOConfig, DPOTrainer

raise SystemExit("a script that is read is not run")
name = "Qwen/Qwen2.5-0.5B-Instruct"
rows = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
arguments = DPOConfig(
    output_dir="Qwen2.5-0.5B-DPO",
    loss_type=["sigmoid", "sft"],
    loss_weights=[1.0, 0.2],
    learning_rate=5e-6,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    seed=int(torch.initial_seed() % 1000),
)
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name),
    args=arguments,
    peft_config=LoraConfig(r=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
)
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "dpo.py"
    path.write_text(SCRIPT)
    return path


def test_arguments_and_what_the_models_and_rows_are(path):
    config = convert(path, gpus=4).config
    expected = {
        "model.model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
        "data.dataset_name": "trl-lib/ultrafeedback_binarized",
        "objective.loss_type": "weighted_sum",
        "objective.terms": [{"loss_type": "dpo", "beta": 0.1}, {"loss_type": "chosen_nll"}],
        "objective.loss_weights": [1.0, 0.2],
        "peft.lora_r": 32,
        "peft.lora_alpha": 8,  # peft's, not TRL's
        "peft.lora_target_modules": ["q_proj", "v_proj"],
        "train.global_batch_size": 2 * 8 * 4,
        "optim.lr_scheduler_type": "linear",
    }
    assert {key: config.get(key) for key in expected} == expected


def test_what_the_script_computes_is_left_to_the_user(path):
    (note,) = convert(path, gpus=1).by_hand
    assert note == "seed: the script computes it: int(torch.initial_seed() % 1000)"


@pytest.mark.parametrize(
    ("text", "message"), [("x = (", ":1: '\\(' was never closed"), ("print(1)", "calls none of DPOConfig")]
)
def test_other_files_are_refused(text, message, path):
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        convert(path, gpus=1)
