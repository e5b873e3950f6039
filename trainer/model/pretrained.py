"""A model from its files or from a config: none of its weights missing or random, and no dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from madpo.trainer.config.model import ModelConfig
from madpo.trainer.errors import UserError, nearest

NEW_LAYER = "score.weight"
"""What a reward model has and the language model that it starts from has not."""


def folder_of(name: str) -> str:
    """Where the model is: of a run's folder the exported one, of anything else itself."""
    exported = Path(name) / "model"
    return str(exported) if _holds_model(exported) and not _holds_model(Path(name)) else name


def _holds_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))


def state_of_files(name: str) -> list[tuple[str, int, int]]:
    """Name, size and time of every file in a model's folder; [] for a name on the hub."""
    files = sorted(file for file in Path(name).glob("*") if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def load_pretrained(
    name: str | None,
    revision: str | None,
    dtype: torch.dtype,
    attention: str | None,  # None: transformers' choice
    kind: Any,
    quantization_config: Any,
    **options: Any,
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
            quantization_config=quantization_config,
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


def build_from_scratch(
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
    """Noise in either model would be noise in the margin between them.

    PhiMoE alone routes by its router_jitter_noise without noise too: `check_noise` is for such models.
    """
    kept = {"router_jitter_noise"} if config.model_type == "phimoe" else set[str]()
    for key, value in config.to_dict().items():
        is_noise = "dropout" in key or key.endswith("pdrop") or "jitter" in key
        if isinstance(value, float) and is_noise and key not in kept:
            setattr(config, key, 0.0)
    return config
