"""Families under two ZeRO-3 ranks: loaded in parts, trained, exported, loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import tiny_config, tiny_model
from harness import make_config, run_ranks, write_pairs
from kernel_cases import relative_error
from plain import padded_logps, zero3_steps
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
)

from madpo.trainer.config.schema import Config
from madpo.trainer.data.order import DataOrder
from madpo.trainer.data.training_data import load_data
from madpo.trainer.model.tokenizer import load_tokenizer
from madpo.trainer.stages.export import export_model
from madpo.trainer.stages.start_engine import start_engine
from madpo.trainer.state import TrainState

pytestmark = pytest.mark.ranks


def save_family(folder: Path, family: str, tokenizer: Path) -> Path:
    tiny_model(family, "eager", vocab_size=311).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def config_of(family: str, tmp_path: Path, tokenizer: Path, **model: Any) -> Config:
    return make_config(
        tmp_path,
        {
            "model": {"model_name_or_path": str(save_family(tmp_path / "start", family, tokenizer)), **model},
            "data": {"dataset_name": str(write_pairs(tmp_path / "pairs.jsonl", 12))},
            "train": {"micro_batch_tokens": 128},
        },
    )


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model folder, by its name in the files."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return out


def load_and_export(shard, config: Config) -> None:
    tokenizer = load_tokenizer(config.model)
    engine = start_engine(config, tokenizer, training=True)
    export_model(engine, tokenizer, config, Path(config.output_dir), shard, TrainState())
    engine.release()


PUBLISHED = {
    "Llama 3": {"model.layers.0.mlp.gate_proj.weight"},
    "Llama 4": {"model.layers.1.feed_forward.experts.gate_up_proj"},
    "Gemma 2": {"model.layers.0.pre_feedforward_layernorm.weight"},
    "Qwen2-MoE": {"model.layers.1.mlp.experts.3.gate_proj.weight", "model.layers.1.mlp.gate.weight"},
    "Qwen3-MoE": {"model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.1.mlp.gate.weight"},
    "Mixtral": {"model.layers.0.block_sparse_moe.experts.3.w1.weight"},
    "gpt-oss": {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.self_attn.sinks"},
    "GPT-NeoX": {"gpt_neox.layers.0.attention.query_key_value.weight", "embed_out.weight"},
}
"""Families that differ in how their files and their memory differ; some names in the files that other
programs look for."""


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_export_is_the_model_that_was_loaded_in_parts(family, tmp_path, tokenizer_folder):
    """Tensor by tensor under the names that transformers writes for a model that was never partitioned, of
    which mixtures have one for every expert where the published models do."""
    config = config_of(family, tmp_path, tokenizer_folder)
    run_ranks(2, load_and_export, config, checks=True)
    start, exported = Path(str(config.model.model_name_or_path)), Path(config.output_dir) / "model"
    assert shapes(exported) == shapes(start)
    assert shapes(exported).keys() >= PUBLISHED[family]
    models: list[Any] = [AutoModelForCausalLM.from_pretrained(folder) for folder in (start, exported)]
    ids = torch.randint(3, 300, (2, 30))
    with torch.no_grad():
        want, got = (model(input_ids=ids).logits for model in models)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["Llama 4", "gpt-oss"])
def test_the_gradients_of_two_ranks_are_those_of_plain_pytorch(family, tmp_path, tokenizer_folder):
    config = config_of(family, tmp_path, tokenizer_folder)
    groups = load_data(config, load_tokenizer(config.model), training=True).train
    assert groups is not None
    batch = [groups[index] for index in DataOrder(len(groups), config.seed).take(0, 8)]
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(config.model.model_name_or_path), attn_implementation="eager"
    )
    logps = padded_logps(model, batch).view(-1, 2)
    ratios = logps - logps.detach()
    (-F.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1]))).mean().backward()
    gradients = run_ranks(2, zero3_steps, config, 1, checks=True)[0][0][1]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative_error(gradients[name], parameter.grad) < 2e-5, name


def test_llama_4_as_published_is_loaded_without_its_eyes(tmp_path, tokenizer_folder):
    """Its config holds one for text; AutoModelForCausalLM takes that."""
    text = tiny_config("Llama 4", vocab_size=311)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32}
    whole = Llama4ForConditionalGeneration(
        Llama4Config(text_config=text.to_dict(), vision_config={**vision, "projector_output_dim": 32})
    )
    start = tmp_path / "start"
    whole.save_pretrained(start)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(start)
    config = config_of("Llama 4", tmp_path / "other", tokenizer_folder, model_name_or_path=str(start))
    run_ranks(2, load_and_export, config, checks=True)
    exported: Any = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / "model")
    ids = torch.randint(3, 300, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, whole(input_ids=ids).logits)


def test_a_model_that_reads_more_than_text_is_refused(tmp_path, tokenizer_folder):
    text = tiny_config("Gemma 3", vocab_size=311)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    start = tmp_path / "start"
    Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text.to_dict(), vision_config={**vision, "image_size": 28, "patch_size": 14})
    ).save_pretrained(start)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(start)
    config = config_of("Gemma 3", tmp_path / "other", tokenizer_folder, model_name_or_path=str(start))
    with pytest.raises(AssertionError, match="Gemma3ForConditionalGeneration reads more than text; save"):
        run_ranks(2, load_and_export, config, checks=True)
