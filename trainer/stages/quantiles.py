"""Replace an objective's thresholds that are given as quantiles by numbers, once, before the run."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from madpo.trainer.config.schema import Config
from madpo.trainer.data.training_data import Data
from madpo.trainer.dist import Shard
from madpo.trainer.errors import UserError
from madpo.trainer.stages.probe import stored_probe


def resolve_quantiles(config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, shard: Shard) -> Config:
    """A copy of the config with a number for every quantile.

    Quantiles are those of the training set's margins, or, for a threshold of token probabilities, of the
    probabilities that the starting model gives to its completions; these are measured once and stored in
    the run folder's `probe.json`. Raises UserError if a number is out of the parameter's range.
    """
    params: Any = config.objective
    if not params.quantiles:
        return config
    assert data.train is not None
    if config.bound_objective.needs_margin:
        values = data.train.margins
    else:
        values = stored_probe(config, data.train, tokenizer, shard).percentiles
    try:
        return config.model_copy(update={"objective": params.resolve(values)})
    except ValidationError as error:
        given = ", ".join(f"{name} quantile:{q:g}" for name, q in params.quantiles.items())
        item = error.errors()[0]
        raise UserError(
            f"objective: {given} is {item['input']:g} in this data; expected {item['msg']}"
            f"{'' if np.any(values) else '; all margins are 0, so no pair has a weight of its own: use dpo'}"
        ) from None
