"""Models from their files, with no weight missing, or from a config with random weights; without dropout."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from madpo.trainer.config.model import ModelConfig
from madpo.trainer.counted import counted
from madpo.trainer.dist import is_lost_peer
from madpo.trainer.errors import UserError, nearest, on_one_line
from madpo.trainer.files import sampled_content
from madpo.trainer.model.families import NOISE_THAT_STAYS
from madpo.trainer.model.foreign_code import NO_CODE, reason_of
from madpo.trainer.model.positions import encode_by_sequence

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Files that say which file each weight is in."""
NEW_LAYER = "score.weight"
"""The weight that a reward model has and the language model it starts from has not."""


class Pretrained(NamedTuple):
    """A model from its files."""

    model: PreTrainedModel
    has_new_layer: bool  # its score layer is not in the files, and random


def state_of_files(name: str) -> list[tuple[str, str]]:
    """(name, hash of samples) of every file in a model's folder; [] for a name on the hub.

    Weights of other values differ in nearly every sample, and reading samples takes no time.
    """
    files = sorted(file for file in Path(name).glob("*") if file.is_file())
    return [(file.name, sampled_content([file])) for file in files]


def load_pretrained(
    name: str | None,
    revision: str | None,
    dtype: torch.dtype,
    attention: str | None,  # None: transformers' choice
    kind: Any,
    quantization_config: Any,
    **options: Any,
) -> Pretrained:
    """Load a model from a folder or the hub. `options` go into its config.

    Raises UserError for a model that cannot be loaded, lacks weights, or reads more than text.
    """
    assert name is not None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of missing weights: they are an error here
    try:
        config = without_dropout(read_config(name, revision, **options))
        _check_indexes(name, revision)
        if kind == AutoModelForCausalLM:
            _refuse_other_kinds(name, config)
        load = partial(
            kind.from_pretrained,
            name,
            config=config,
            revision=revision,
            dtype=dtype,
            output_loading_info=True,
            quantization_config=quantization_config,
            **NO_CODE,
        )
        model, info = make_with_attention(load, attention)
    except UserError:
        raise
    except (
        *(OSError, EOFError, ValueError, RuntimeError, KeyError, TypeError),
        *(SafetensorError, pickle.UnpicklingError),
    ) as error:
        if is_lost_peer(error):  # ranks share out the weights as they load
            raise
        raise _not_loaded(name, error) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(set(info["missing_keys"]) - {NEW_LAYER})
    if missing:
        raise UserError(
            f"model {name!r}: {counted(len(missing), 'weight')} missing from its files, "
            f"{missing[0]} for one, which would be random; "
            "the files do not belong to the config beside them"
        )
    refuse_more_than_text(name, model)
    encode_by_sequence(model)
    return Pretrained(model, has_new_layer=NEW_LAYER in info["missing_keys"])


def _check_indexes(name: str, revision: str | None) -> None:
    """Raise UserError if an index of the model's weights names a file outside the model's folder.

    What is inside may be a link, as all files are that the hub's cache holds.
    """
    for index in INDEXES:
        options: Any = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
        if (file := cached_file(name, index, **options)) is None:
            continue
        try:
            places = {PurePath(place) for place in json.loads(Path(file).read_bytes())["weight_map"].values()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"model {name!r}: its {index} cannot be read: {on_one_line(error)}") from None
        for path in places:
            if path.is_absolute() or ".." in path.parts:
                raise UserError(
                    f"model {name!r}: its {index} names {str(path)!r}, which is outside its folder"
                )


def read_config(name: str, revision: str | None, **options: Any) -> PreTrainedConfig:
    """The config of a model in a folder or on the hub; `options` replace its values. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(name, revision=revision, **NO_CODE, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: Exception) -> UserError:
    hint = "" if Path(name).exists() else " (no such folder, and no model of that name on the hub)"
    return UserError(f"model {name!r} could not be loaded{hint}: {reason_of(error)}")


def _refuse_other_kinds(name: str, config: PreTrainedConfig) -> None:
    """Raise UserError for a model that does not write text token by token, by the names in its config."""
    made = (config.architectures or [type(config).__name__])[0]
    if made in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return
    if classifier_of(config) is not None:
        what = f"a reward model ({made}), which writes no text"
    elif getattr(config, "is_encoder_decoder", False):
        what = f"an encoder-decoder model ({made}), whose prompts have layers of their own"
    elif made in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        what = f"a masked language model ({made}), whose tokens see those behind them"
    else:
        return
    raise UserError(f"model {name!r} is {what}; name a causal language model")


def refuse_more_than_text(name: str, model: PreTrainedModel) -> None:
    """Raise UserError for a model that has other parts beside its language model."""
    try:
        is_text = model.config.get_text_config() is model.config
    except ValueError:  # it has several
        is_text = False
    if not is_text:
        raise UserError(
            f"model {name!r}: {type(model).__name__} reads more than text; save its language model by itself "
            "and name that"
        )


def make_with_attention(make: Callable[..., Any], attention: str | None) -> Any:
    """What `make` gives for this attention; or for transformers' own choice, where a family looks its
    attention up in a table of its own, which does not know ours."""
    try:
        return make(attn_implementation=attention)
    except KeyError as error:
        if error.args != (attention,):
            raise
        return make(attn_implementation=None)


def classifier_of(config: PreTrainedConfig) -> str | None:
    """The classifier that the files beside a config are of, as those of reward models are; else None."""
    names = (name for name in config.architectures or [] if name.endswith("ForSequenceClassification"))
    return next(names, None)


def build_from_scratch(
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    attention: str,
    kind: Any,
    **options: Any,
) -> PreTrainedModel:
    """A model with random weights by `model.init_config`. `options` go into its config.

    Raises UserError for a family or a value that transformers does not know.
    """
    assert model.init_config is not None
    values = dict(model.init_config)
    family = values.pop("model_type")
    try:
        defaults = AutoConfig.for_model(family).to_dict()
    except ValueError as error:
        raise UserError(f"model.init_config.model_type: {family!r} is unknown to transformers") from error
    for key in values.keys() - defaults.keys():
        raise UserError(f"model.init_config.{key}: {family} has no such value{nearest(key, defaults)}")
    values = {"vocab_size": len(tokenizer), **values}
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    known = {key: token for key, token in special.items() if token is None or token < values["vocab_size"]}
    config = AutoConfig.for_model(family, **{**known, **options, **values})
    try:
        made = make_with_attention(partial(kind.from_config, without_dropout(config), dtype=dtype), attention)
    except ValueError as error:
        raise UserError(f"model.init_config.model_type: {family}: {error}") from error
    encode_by_sequence(made)
    return made


def without_dropout(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set dropout and jitter to 0, also in the configs inside.

    Noise in policy or reference would be noise in the margin between them.
    """
    stays = NOISE_THAT_STAYS.get(config.model_type, set[str]())
    for key, value in config.to_dict().items():
        is_noise = "dropout" in key or key.endswith("pdrop") or "jitter" in key
        if isinstance(value, float) and is_noise and key not in stays:
            setattr(config, key, 0.0)
    for name in config.sub_configs:
        if isinstance(inside := getattr(config, name, None), PreTrainedConfig):
            without_dropout(inside)
    return config
