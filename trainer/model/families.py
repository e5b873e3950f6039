"""The one list of what is known about single model families, each entry with its reason.

Nothing else in the trainer names a family. What is not here is read off a model's config and modules, and
held against the model itself by the checks before the first step (startup/).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from madpo.trainer.model.attention.segments import SegmentTable

NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Config names for the number of experts of a layer."""

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
"""Config names for the number of experts that a token is sent to."""

LOCAL_SIZES = ("sliding_window", "attention_chunk_size")
"""Config names for how far a layer's tokens see: a window that moves with the query or, in Llama 4, chunks,
whose tokens see their own chunk alone."""

COMPRESSION = "compress_rates"
"""DeepSeek V4's config name for how many tokens a compressed key stands for, by kind of layer."""

NOISE_THAT_STAYS = {"phimoe": {"router_jitter_noise"}}
"""PhiMoE's router weighs experts by this value in evaluation too, so that it cannot be set to 0.
`startup.checks.check_noise` refuses the models that draw noise in training."""


def num_experts(model: PreTrainedModel) -> int:
    """Experts of each mixture in the model; 0 where it has none."""
    return next((n for name in NUM_EXPERTS if (n := getattr(model.config, name, None))), 0)


def experts_per_token(model: PreTrainedModel) -> int:
    """Experts that a token is sent to; 0 where the config does not say."""
    return next((n for name in EXPERTS_PER_TOKEN if (n := getattr(model.config, name, None))), 0)


def logit_scale(config: Any) -> float:
    """What the output layer's product is multiplied by. HyperCLOVA X multiplies by `logits_scaling`, where
    all other families divide by it."""
    scale = getattr(config, "logit_scale", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return scale * (scaling if config.model_type == "hyperclovax" else 1.0 / scaling)


def layer_configs(config: PreTrainedConfig) -> list[Any]:
    """The config that holds for each layer. In Gemma 4 they differ from layer to layer."""
    values: Any = config
    if getattr(config, "is_heterogeneous", False):
        return list(values.per_layer_config)
    return [values] * values.num_hidden_layers


def rescale_queries(module: Any, query: Tensor, segments: SegmentTable) -> Tensor:
    """Correct Llama 4's query temperature for packed rows; other models' queries are returned unchanged.

    In layers without rotary embedding Llama 4 scales a query by the logarithm of its index in the row (or in
    a slice of the row), which it takes for the position. Divide by the one scale, multiply by the other.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query

    def scale(position: Tensor) -> Tensor:
        return torch.log1p(torch.floor((position + 1.0) / module.floor_scale)) * module.attn_scale + 1.0

    tokens = query.shape[2]
    slices = 1 if segments.group is None else segments.group.size
    indices = torch.arange(tokens, device=query.device) % (tokens // slices)
    correction = scale(segments.positions_on(query.device)) / scale(indices)
    return (query * correction[:, None]).to(query.dtype)
