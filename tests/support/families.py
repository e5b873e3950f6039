"""Tiny random models of every family that docs/families.md names, so shaped that all their kinds of layers
occur and that windows, chunks and scales bend within a few tokens; and log-probs, packed and alone."""

from __future__ import annotations

from typing import Any

import torch
from harness import random_groups
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from madpo.trainer.batches.packing import pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.model.attention.prefix_sharing import SegmentTable
from madpo.trainer.model.backbone import output_head, scored_hidden

VOCAB = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
WINDOW, FULL = "sliding_attention", "full_attention"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 16.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
MANY_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 24}

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama 3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "Llama 4": {
        "model_type": "llama4_text",
        "num_hidden_layers": 4,
        "head_dim": 12,
        "intermediate_size_mlp": 64,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "no_rope_layers": [1, 1, 1, 0],
        "attention_chunk_size": 8,
        "attn_temperature_tuning": True,
        "floor_scale": 4,
        "attn_scale": 0.5,
        "rope_parameters": LLAMA3_ROPE,
    },
    "Qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "Qwen2.5": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": [FULL, WINDOW],
    },
    "Qwen2-MoE": {
        "model_type": "qwen2_moe",
        **MANY_EXPERTS,
        "shared_expert_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "Qwen3": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True},
    "Qwen3-MoE": {"model_type": "qwen3_moe", **MANY_EXPERTS, "head_dim": 12, "norm_topk_prob": True},
    "Gemma 2": {
        "model_type": "gemma2",
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "Gemma 3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 3,
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 7,
        "layer_types": [WINDOW, WINDOW, FULL],
        "tie_word_embeddings": True,
    },
    "Mistral": {"model_type": "mistral", "head_dim": 12, "sliding_window": 9},
    "Mixtral": {"model_type": "mixtral", **EXPERTS, "head_dim": 12, "sliding_window": 9},
    "Phi": {"model_type": "phi", "partial_rotary_factor": 0.5, "hidden_size": 64},
    "Phi-3": {"model_type": "phi3", "sliding_window": 9, "partial_rotary_factor": 1.0},
    "OLMo 2": {"model_type": "olmo2"},
    "gpt-oss": {
        "model_type": "gpt_oss",
        **EXPERTS,
        "head_dim": 12,
        "sliding_window": 7,
        "layer_types": [WINDOW, FULL],
        "rope_parameters": YARN,
    },
    "GPT-NeoX": {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "use_parallel_residual": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25},
    },
    "SmolLM": {"model_type": "llama", "tie_word_embeddings": True},
    "SmolLM3": {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "tie_word_embeddings": True,
    },
    "Cohere": {"model_type": "cohere", "logit_scale": 0.25, "tie_word_embeddings": True},
    "Granite": {
        "model_type": "granite",
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "HyperCLOVA X": {"model_type": "hyperclovax", "logits_scaling": 4.0, "head_dim": 12},
}
"""The table's name -> `model_type` and values."""


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    values = {**SIZES, **FAMILIES[family], **changes}
    return AutoConfig.for_model(**values)


def tiny_model(family: str, attention: str, **changes: Any) -> Any:
    """Random, and with no parameter left at a value, such as 0 or 1, at which its part would not matter."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **changes), dtype=torch.float32, attn_implementation=attention
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def groups() -> list[TokenGroup]:
    """One, two and three completions, a prompt of one token, and lengths beyond every window and chunk."""
    one, two, three = (random_groups(2, count, completions=count, vocab=VOCAB) for count in (1, 2, 3))
    short = TokenGroup([5], [[7], list(range(9, 34))], [])
    long = TokenGroup(list(range(20, 42)), [list(range(50, 70)), list(range(60, 63))], [])
    return [*one, *two, short, *three, long]


def packed_logps(model: Any) -> torch.Tensor:
    batch = pack(groups())
    hidden = scored_hidden(model, batch, SegmentTable(batch.segments))
    head = output_head(model)
    logits = head.transform(torch.nn.functional.linear(hidden, head.weight, head.bias))
    return logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]


def plain_logps(model: Any) -> torch.Tensor:
    """(M,) by the whole model, one completion at a time."""
    out = []
    for group in groups():
        for completion in group.completions:
            ids = torch.tensor([group.prompt + completion])
            rows = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt) - 1 : -1]
            out.append(rows.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(out)
