"""Folders that hold another thing than what is asked of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from harness import save_classifier, save_model
from transformers import AutoModelForCausalLM

from madpo.trainer.config.model import ModelConfig
from madpo.trainer.errors import UserError
from madpo.trainer.model.pretrained import load_pretrained
from madpo.trainer.model.tokenizer import load_tokenizer


def refusal(folder: Path) -> str:
    """What a policy from the folder is refused with."""
    with pytest.raises(UserError) as caught:
        load_pretrained(str(folder), None, torch.float32, "eager", AutoModelForCausalLM, None)
    return str(caught.value)


def test_a_reward_model_is_no_policy(tmp_path, tokenizer_folder):
    folder = save_classifier(tmp_path / "reward", tokenizer_folder)
    assert refusal(folder) == (
        f"model {str(folder)!r} is a reward model (LlamaForSequenceClassification), which writes no text; "
        "name a causal language model"
    )


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("BertForMaskedLM", "a masked language model (BertForMaskedLM), whose tokens see those behind them"),
        (
            "T5ForConditionalGeneration",
            "an encoder-decoder model (T5ForConditionalGeneration), whose prompts have layers of their own",
        ),
    ],
)
def test_a_model_that_does_not_write_token_by_token_is_no_policy(tmp_path, family, kind):
    config = getattr(transformers, family).config_class(architectures=[family])
    config.save_pretrained(tmp_path)  # refused before its weights are looked for
    assert refusal(tmp_path) == f"model {str(tmp_path)!r} is {kind}; name a causal language model"


def test_families_that_could_be_loaded_are_not_listed(tmp_path):
    transformers.CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path)
    text = refusal(tmp_path)
    assert "CLIPConfig" in text and "LlamaConfig" not in text and len(text) < 400


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
