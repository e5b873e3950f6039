"""Loading tokenizers and models, straight into ZeRO-3 partitions where an engine config is active."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from madpo.trainer.config import Config, ModelConfig
from madpo.trainer.model import prefix_attention
from madpo.trainer.model.policy import PolicyWithReference


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, or the one named. Raises ValueError if there is none."""
    name = model.tokenizer_name_or_path or model.model_name_or_path
    assert name is not None
    try:
        return AutoTokenizer.from_pretrained(name, revision=model.model_revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer could be loaded from {name!r}: {error}") from error


def build_module(config: Config, tokenizer: PreTrainedTokenizerBase) -> PolicyWithReference:
    """Policy, reference where the objective needs one, and head. Raises ValueError for a model that
    cannot be loaded or does not fit its tokenizer."""
    entry, model = config.objective_entry, config.model
    prefix_attention.register()
    prefix_attention.require(model.attention)
    attention = prefix_attention.NAMES[model.attention]
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    torch.manual_seed(config.seed)
    policy = _from_scratch(model, tokenizer, dtype, attention) if model.init_config else None
    policy = policy or _pretrained(model.model_name_or_path, model.model_revision, dtype, attention)
    reference = None
    if entry.needs_reference:
        named = model.ref_model_name_or_path
        revision = None if named else model.model_revision
        reference = _pretrained(named or model.model_name_or_path, revision, dtype, attention)
        _same_vocabulary(policy, reference)
    if len(tokenizer) > policy.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model only {policy.config.vocab_size}; "
            "they do not belong together (model.tokenizer_name_or_path)"
        )
    if model.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return PolicyWithReference(policy, reference, entry, config.objective, config.train.head_rows)


def _pretrained(
    name: str | None, revision: str | None, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    assert name is not None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, attn_implementation=attention
        )
    except (OSError, ValueError) as error:
        hint = "" if Path(name).exists() else " (no such folder, and no model of that name on the hub)"
        raise ValueError(f"model {name!r} could not be loaded{hint}: {error}") from error
    _disable_dropout(model)
    return model


def _from_scratch(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    assert model.init_config is not None
    values = dict(model.init_config)
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(
        values.pop("model_type"), **{"vocab_size": len(tokenizer), **special, **values}
    )
    built = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    _disable_dropout(built)
    return built


def _disable_dropout(model: PreTrainedModel) -> None:
    """Noise in either model would be noise in the margin between them."""
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _same_vocabulary(policy: PreTrainedModel, reference: PreTrainedModel) -> None:
    ours, theirs = policy.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"policy and reference have vocabularies of {ours} and {theirs} tokens; the reference must "
            "be a model with the same tokenizer (model.ref_model_name_or_path)"
        )
