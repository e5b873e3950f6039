"""Loading tokenizers and models, straight into ZeRO-3 partitions where an engine config is active."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from madpo.trainer.config import Config, ModelConfig
from madpo.trainer.errors import UserError
from madpo.trainer.model import prefix_attention
from madpo.trainer.model.balance import expert_balance
from madpo.trainer.model.policy import PolicyWithReference
from madpo.trainer.model.reward import RewardModel
from madpo.trainer.model.vocabulary import fit_vocabulary
from madpo.trainer.strict_yaml import nearest

NEW_LAYER = "score.weight"
"""What a reward model has and the language model that it starts from has not."""


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, or the one named. Raises ValueError if there is none."""
    name = model.tokenizer_name_or_path or model.model_name_or_path
    assert name is not None
    revision = None if model.tokenizer_name_or_path else model.model_revision
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer could be loaded from {name!r}: {error}") from error


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token to pad with that ends no completion: transformers' classifiers score the last other token.

    Raises ValueError if the tokenizer has none.
    """
    names = ("pad_token_id", "unk_token_id", "bos_token_id")
    for token in (getattr(tokenizer, name) for name in names):
        if token is not None and token != tokenizer.eos_token_id:
            return token
    raise UserError(
        "a reward model needs a tokenizer with a pad token that is not its EOS token, or with an UNK or BOS "
        "token to take its place (model.tokenizer_name_or_path)"
    )


def build_module(config: Config, tokenizer: PreTrainedTokenizerBase) -> PolicyWithReference | RewardModel:
    """Policy, reference where the objective needs one, and head; or a reward model. Raises ValueError for
    a model that cannot be loaded or does not fit its tokenizer."""
    entry, model = config.objective_entry, config.model
    prefix_attention.register()
    prefix_attention.require(model.attention)
    attention = prefix_attention.NAMES[model.attention]
    dtype = torch.bfloat16 if config.train.bf16 else torch.float32
    torch.manual_seed(config.seed)
    rewards = "scores" in entry.needs
    kind: Any = AutoModelForSequenceClassification if rewards else AutoModelForCausalLM
    options = {"num_labels": 1} if rewards else {}
    load = partial(_pretrained, dtype=dtype, attention=attention, kind=kind, **options)
    if model.init_config:
        policy = _from_scratch(model, tokenizer, dtype, attention, kind, **options)
    else:
        policy = load(model.model_name_or_path, model.model_revision)
    reference = None
    if entry.needs_reference:
        named = model.ref_model_name_or_path
        revision = None if named else model.model_revision
        reference = load(named or model.model_name_or_path, revision)
    fit_vocabulary(policy, reference, len(tokenizer), model.resize_embeddings)
    if model.sync_ref_model and reference is not None:
        _same_shapes(policy, reference)
    if model.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if rewards:
        padding_token(tokenizer)
        return RewardModel(policy, entry, config.objective)
    budget_bytes = int(config.train.head_gib * 2**30)
    balance = expert_balance(policy, model.router_aux_loss_coef)
    return PolicyWithReference(
        policy, reference, entry, config.objective, budget_bytes, config.train.head_impl, balance
    )


def _pretrained(
    name: str | None, revision: str | None, dtype: torch.dtype, attention: str, kind: Any, **options: Any
) -> PreTrainedModel:
    assert name is not None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of weights that are not there; we refuse instead
    try:
        config = _without_dropout(AutoConfig.from_pretrained(name, revision=revision, **options))
        model, found = kind.from_pretrained(
            name,
            config=config,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        hint = "" if Path(name).exists() else " (no such folder, and no model of that name on the hub)"
        raise UserError(f"model {name!r} could not be loaded{hint}: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(set(found["missing_keys"]) - {NEW_LAYER})
    if missing:
        raise UserError(
            f"model {name!r}: {len(missing)} weights are missing and would be random, {missing[0]} for one; "
            "the files do not belong to the config beside them"
        )
    model.has_new_layer = NEW_LAYER in found["missing_keys"]
    if model.config.get_text_config() is not model.config:
        raise UserError(
            f"model {name!r}: {type(model).__name__} reads more than text; save its language model by itself "
            "and name that"
        )
    return model


def _from_scratch(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    attention: str,
    kind: Any,
    **options: Any,
) -> PreTrainedModel:
    assert model.init_config is not None
    values = dict(model.init_config)
    family = values.pop("model_type")
    try:
        known = AutoConfig.for_model(family).to_dict()
    except ValueError as error:
        raise UserError(f"model.init_config.model_type: {family!r} is unknown to transformers") from error
    for key in values.keys() - known.keys():
        raise UserError(f"model.init_config.{key}: {family} has no such value{nearest(key, known)}")
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(family, **{"vocab_size": len(tokenizer), **special, **options, **values})
    try:
        return kind.from_config(_without_dropout(config), dtype=dtype, attn_implementation=attention)
    except ValueError as error:
        raise UserError(f"model.init_config.model_type: {family}: {error}") from error


def _without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Noise in either model would be noise in the margin between them."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    return config


def _same_shapes(policy: PreTrainedModel, reference: PreTrainedModel) -> None:
    """A parameter that ZeRO-3 has partitioned keeps its real shape in ds_shape."""
    ours, theirs = (
        {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
        for model in (policy, reference)
    )
    if ours != theirs:
        name = next(name for name in ours | theirs if ours.get(name) != theirs.get(name))
        raise UserError(
            f"model.sync_ref_model: {name} is {ours.get(name)} in the policy and {theirs.get(name)} in the "
            "reference; both must be of one architecture"
        )
