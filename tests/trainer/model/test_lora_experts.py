"""Adapters on mixtures of experts: all linear layers but routers and experts that are one parameter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import tiny_model
from harness import make_config, run_ranks, write_pairs
from lora_cases import train
from transformers import AutoTokenizer

from madpo.trainer.config.peft import PeftConfig
from madpo.trainer.model import lora

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
DENSE = {"gate_proj", "up_proj", "down_proj"}
ADAPTED = {
    "Mixtral": ATTENTION,
    "Qwen3-MoE": ATTENTION,
    "gpt-oss": ATTENTION,
    "Llama 4": ATTENTION | DENSE,
    "Qwen2-MoE": ATTENTION | DENSE | {"shared_expert_gate"},
    "Llama 3": ATTENTION | DENSE,
}


@pytest.mark.parametrize("family", ADAPTED)
def test_all_linear_leaves_out_routers_experts_and_head(family):
    model = tiny_model(family, "eager")
    lora.attach(model, lora.new_config(PeftConfig(), "x", None, False), lora.POLICY)
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name.rpartition(".")[2] for name in adapted} == ADAPTED[family]
    layers = range(model.config.num_hidden_layers)
    assert {f"model.layers.{i}.self_attn.{name}" for i in layers for name in ATTENTION} <= adapted


@pytest.mark.ranks
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "gpt-oss"])
def test_an_adapter_on_all_linear_trains_and_can_be_trained_on(family, tmp_path, tokenizer_folder, capfd):
    tiny_model(family, "eager", vocab_size=311).save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "start")

    def step(name: str, model: Path) -> dict[str, float]:
        tree = {
            "output_dir": str(tmp_path / name),
            "model": {"model_name_or_path": str(model)},
            "peft": {"lora_r": 4},
            "data": {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 8))},
            "train": {"max_steps": 1},
        }
        run_ranks(1, train, make_config(tmp_path, tree))
        return json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])

    first = step("one", tmp_path / "start")
    assert first["rewards/margins"] == 0.0 and first["grad_norm"] > 0
    assert "the experts have no adapter" in capfd.readouterr().out
    again = step("two", tmp_path / "one" / "model")
    assert again["rewards/margins"] == 0.0 and again["grad_norm"] > 0
