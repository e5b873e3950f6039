"""Models that compute something else in training: the noise is taken away, or the model refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS, SIZES, tiny_model
from harness import make_config, run_ranks, write_pairs
from lora_cases import train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from madpo.trainer.config.schema import Config
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.startup.checks import check_noise

PHIMOE = {**SIZES, "model_type": "phimoe", **EXPERTS, "head_dim": 12}


def run_of(model: Any, folder: Path, tokenizer: Path) -> Config:
    model.save_pretrained(folder / "start")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "start")
    return make_config(
        folder,
        {
            "model": {"model_name_or_path": str(folder / "start")},
            "peft": {"lora_r": 4, "lora_target_modules": ["q_proj"]},
            "data": {"dataset_name": str(write_pairs(folder / "pairs.jsonl", 8))},
            "train": {"max_steps": 1, "export": False},
        },
    )


@pytest.mark.ranks
def test_jitter_of_the_router_is_off(tmp_path, tokenizer_folder):
    """Policy and reference are one model in training mode: noise would be their margin."""
    model = tiny_model("Mixtral", "eager", vocab_size=311, router_jitter_noise=0.1)
    config = run_of(model, tmp_path, tokenizer_folder)
    run_ranks(1, train, config, checks=True)
    first = json.loads((Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rewards/margins"] == 0.0 and first["kl"] == 0.0


@pytest.mark.ranks
def test_experts_that_are_drawn_are_refused(tmp_path, tokenizer_folder):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**PHIMOE, "vocab_size": 311}))
    config = run_of(model, tmp_path, tokenizer_folder)
    with pytest.raises(AssertionError, match="PhimoeForCausalLM: in training its hidden states differ"):
        run_ranks(1, train, config, checks=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_check_leaves_the_mode_as_it_was_and_lets_quiet_models_pass(dtype):
    prefix_sharing.register()
    for family in ("Llama 3", "Mixtral", "gpt-oss"):
        model = tiny_model(family, prefix_sharing.NAMES["sdpa"]).to(dtype)
        for mode in (False, True):
            model.train(mode)
            check_noise(model, torch.device("cpu"))
            assert all(module.training == mode for module in model.modules())
    noisy = tiny_model("Mixtral", prefix_sharing.NAMES["sdpa"], router_jitter_noise=0.5).to(dtype)
    with pytest.raises(ValueError, match="in training its hidden states differ from those in evaluation"):
        check_noise(noisy, torch.device("cpu"))
