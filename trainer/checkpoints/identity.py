"""The identity of a run: what must be alike for a checkpoint to be continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from madpo.trainer.config.deepspeed import keys_of_numbers
from madpo.trainer.config.effects import may_continue
from madpo.trainer.config.schema import Config
from madpo.trainer.dist import Shard
from madpo.trainer.masking import masked

RANKS = "number of ranks"
LENGTH = ("train.max_steps", "train.num_train_epochs")
"""What may be another value in a run that is extended."""


def identity(
    config: Config, shard: Shard, content: str | None = None, models: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What must not change between a run and its continuation: dotted key -> value.

    `content` is the fingerprint of the training data, `models` are those of models, by key. The number of
    ranks changes no more than rounding, unless the loss has a part that is one of each packed row.
    Secrets are masked.
    """
    out: dict[str, Any] = {}
    for section, values in masked(config.model_dump(mode="json", by_alias=True)).items():
        flat = values if isinstance(values, dict) else {"": values}
        if section == "peft":  # that there is an adapter at all counts too
            flat = {"": values is not None, **(values or {})}
        out |= {f"{section}.{key}".rstrip("."): value for key, value in flat.items()}
    router_loss = config.model.router_aux_loss_coef > 0
    kept = masked(keys_of_numbers(config.deepspeed))
    out = {key: value for key, value in out.items() if not may_continue(key, router_loss)} | kept
    if router_loss:
        out[RANKS] = shard.world_size
    if content is not None:
        out["data (content)"] = content
    return out | dict(models or {})


def model_identity(config: Config, shard: Shard, models: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The part of the identity that decides which weights can be loaded, and what they are compared with."""
    whole = identity(config, shard, models=models)
    return {key: value for key, value in whole.items() if key.startswith(("model.", "peft"))}


def without_length(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The identity without the length of the run, for one that is extended."""
    return {key: value for key, value in identity.items() if key not in LENGTH}


def difference(stored: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The keys of `now` that have other values in `stored`, as lines for the user; None if there are none."""
    changed = {key for key in now if key not in stored or stored[key] != now[key]}
    sections = tuple(f"{key}." for key in changed)  # a section that comes or goes says it for all of its keys
    changed = [key for key in now if key in changed and not key.startswith(sections)]
    lines = [f"\n  {key}: {shown(stored.get(key))} there, {shown(now[key])} now" for key in changed]
    return "".join(lines) or None


def shown(value: Any) -> str:
    """A value as a user would write it in YAML."""
    return json.dumps(value) if isinstance(value, bool | None) else repr(value)
