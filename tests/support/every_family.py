"""Tiny models of every causal family of transformers, made of the family's own defaults, and what becomes of
them at the start of a run."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

EVERY_FAMILY = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 101
SMALL: dict[int, tuple[str, ...]] = {
    VOCAB: ("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"),
    256: (
        "max_position_embeddings",
        "n_positions",
        "max_seq_len",
        "model_max_length",
        "context_length",
        "n_ctx",
    ),
    64: (
        *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim"),
        *("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "shared_intermediate_size"),
        *(
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "expert_ffn_hidden_size",
            "dim_ff",
            "dff",
            "d_inner",
        ),
        *("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "feed_forward_size"),
    ),
    48: (
        *(
            "hidden_size",
            "d_model",
            "n_embd",
            "embedding_size",
            "word_embed_proj_dim",
            "attention_hidden_size",
        ),
        *(
            "dim",
            "emb_dim",
            "lru_width",
            "backbone_hidden_size",
            "input_embedding_size",
            "output_embedding_size",
        ),
        *("embedding_dim",),
    ),
    16: ("kv_lora_rank", "q_lora_rank", "hidden_size_per_layer_input", "state_size", "mamba_d_state"),
    12: ("head_dim", "v_head_dim", "qk_head_dim", "swa_head_dim", "index_head_dim", "linear_key_head_dim"),
    8: (
        "qk_nope_head_dim",
        "linear_value_head_dim",
        "linear_head_dim",
        "sliding_window",
        "attention_chunk_size",
    ),
    4: (
        *(
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "attention_heads",
        ),
        *(
            "encoder_attention_heads",
            "num_experts",
            "n_routed_experts",
            "num_local_experts",
            "moe_num_experts",
        ),
        *("swa_num_attention_heads", "qk_rope_head_dim", "index_n_heads", "linear_num_heads"),
    ),
    2: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
        *(
            "num_key_value_heads",
            "num_kv_heads",
            "num_experts_per_tok",
            "moe_topk",
            "moe_k",
            "num_query_groups",
        ),
        *("linear_num_key_heads", "linear_num_value_heads", "swa_num_key_value_heads"),
    ),
    1: ("n_group", "topk_group", "first_k_dense_replace", "num_expert_group"),
}
"""Value -> keys that have it in every family that knows them."""

MLA = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4, "qk_head_dim": 12}
"""Sizes of latent attention; its rotary part is what such a config calls a head."""
LATENT = {**MLA, "num_key_value_heads": 4}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 12,
    "mamba_n_groups": 1,
    "mamba_d_state": 4,
    "mamba_chunk_size": 8,
}

OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "deepseek_v2": {**LATENT, "num_experts_per_tok": 2},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 96},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 64, "activation_sparsity_pattern": None},
    "glm_moe_dsa": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 12},
    "hunyuan_v1_moe": {"head_dim": 12, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "kimi_linear": {"num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {**LATENT, "zero_expert_num": 2, "n_routed_experts": 4, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 12, "n_groups": 1, "chunk_size": 8},
    "ministral": {"head_dim": 12},
    "nemotron": {"head_dim": 12, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 12, "n_groups": 1, "ssm_state_size": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 12,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 8},
    "roc_bert": {
        "pronunciation_vocab_size": 20,
        "shape_vocab_size": 20,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "stablelm": {"hidden_size": 64},
    "xlstm": {"autocast_kernel_dtype": "float32"},
    "youtu": LATENT,
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "attention_hidden_size": 96,
        "attention_head_dim": 24,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""`model_type` -> values that fit together where those above do not."""


def tiny_config(family: str) -> PreTrainedConfig:
    """A config with one layer of each kind that the family's own defaults have, two if all are alike.

    Raises what transformers raises for a family that cannot be made this small.
    """
    kind: Any = CONFIG_MAPPING[family]
    default: Any = kind()
    if (text := default.get_text_config()) is not default:
        return kind(text_config=tiny_config(text.model_type).to_dict())
    known = default.to_dict()
    small = {key: value for value, keys in SMALL.items() for key in keys}
    values: dict[str, Any] = {key: value for key, value in small.items() if isinstance(known.get(key), int)}
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if "initializer_range" in known:
        values["initializer_range"] = 0.15
    kinds = {key: list(dict.fromkeys(known.get(key) or [])) for key in ("layer_types", "mlp_layer_types")}
    count = max(map(len, kinds.values()))
    if count > 1:
        values["num_hidden_layers"] = count
        values |= {key: [each[i % len(each)] for i in range(count)] for key, each in kinds.items() if each}
    return kind(**{**values, **OWN.get(family, {})})
