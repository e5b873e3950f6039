"""Folders that hold another thing than what is asked of them."""

from __future__ import annotations

import shutil

import pytest
import torch
from harness import save_classifier, save_model
from transformers import AutoModelForCausalLM

from madpo.trainer.config.model import ModelConfig
from madpo.trainer.model.pretrained import load_pretrained
from madpo.trainer.model.tokenizer import load_tokenizer


def test_a_reward_model_is_no_policy(tmp_path, tokenizer_folder):
    folder = str(save_classifier(tmp_path / "reward", tokenizer_folder))
    with pytest.raises(ValueError) as caught:
        load_pretrained(folder, None, torch.float32, "eager", AutoModelForCausalLM, None)
    assert str(caught.value) == (
        f"model {folder!r} is a reward model (LlamaForSequenceClassification), which writes no text; name a "
        "language model"
    )


@pytest.mark.parametrize("key", ["model_name_or_path", "tokenizer_name_or_path"])
def test_a_folder_without_a_tokenizer_says_so(tmp_path, tokenizer_folder, key):
    folder = save_model(tmp_path / "model", tokenizer_folder, seed=1)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, bare)
    with pytest.raises(ValueError) as caught:
        load_tokenizer(ModelConfig.model_validate({key: str(bare)}))
    assert str(caught.value) == (
        f"model.{key}: {bare} holds no tokenizer; set model.tokenizer_name_or_path to the model that it was "
        "made of"
    )
    named = ModelConfig(model_name_or_path=str(bare), tokenizer_name_or_path=str(folder))
    assert load_tokenizer(named).eos_token_id == 2
