"""The token that ends an answer: what training has taught, the exported model must stop at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from madpo.trainer.counted import counted
from madpo.trainer.data.chat_template import render
from madpo.trainer.data.groups import TokenGroups
from madpo.trainer.model.lora import is_adapted
from madpo.trainer.sampling.samplers import ends_of

LOOKED_AT = 100
"""The number of training groups whose completions are looked at."""

TAIL = 4
"""The last scored tokens of a completion that are looked at: templates write a line break behind the end."""


def taught_end(
    groups: TokenGroups,
    indices: np.ndarray,  # (n,) of the groups to look at
    tokenizer: PreTrainedTokenizerBase,
) -> int | None:
    """The special token that the chat template writes behind an answer, if completions of the data end so.

    None without a template, and for plain text.
    """
    end = end_of_turn(tokenizer)
    return end if end is not None and any(end in tail for tail in _tails(groups, indices)) else None


def endless(
    groups: TokenGroups,
    indices: np.ndarray,  # (n,) of the groups to look at
    tokenizer: PreTrainedTokenizerBase,
) -> str | None:
    """What to tell the user if no completion ends with a special token, so that a model trained to write them
    does not learn to stop."""
    decode: Any = tokenizer.decode
    ends, tails = _ends(tokenizer), list(_tails(groups, indices))
    last = (next((x for x in reversed(tail) if decode([x]).strip()), None) for tail in tails)
    if not tails or not ends.isdisjoint(last):
        return None
    return (
        f"none of the first {counted(len(tails), 'completion')} ends with a special token, so the model does "
        "not learn to stop; data.append_eos=always writes the end of sequence behind each"
    )


def _tails(groups: TokenGroups, indices: np.ndarray) -> Iterator[list[int]]:
    """The last scored tokens of each completion of the groups with these (n,) indices."""
    for group in (groups[int(index)] for index in indices):
        for completion, mask in zip(group.completions, group.whole_masks, strict=True):
            yield [token for token, is_scored in zip(completion, mask, strict=True) if is_scored][-TAIL:]


def _ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that may end an answer. Gemma's line breaks are added tokens too."""
    return {token for token, added in tokenizer.added_tokens_decoder.items() if added.content.strip()}


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes behind an answer; None if it writes none."""
    if tokenizer.chat_template is None:
        return None
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        asked, _ = render([ask], tokenizer, {"add_generation_prompt": True})
        answered, _ = render([ask, answer], tokenizer, {})
    except Exception:  # a template may raise anything, and this one may want other messages
        return None
    ends = _ends(tokenizer)
    return next((token for token in reversed(answered[len(asked) :]) if token in ends), None)


def stop_at(model: Any, end: int | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Let the model's generation stop at this token too; what to tell the user if it did not before."""
    settings = getattr(model, "generation_config", None)
    if end is None or settings is None:
        return None
    ends = ends_of(settings.eos_token_id, tokenizer)
    if end in ends:
        return None
    settings.eos_token_id = sorted({*ends, end})
    what = (
        f"answers end with {tokenizer.convert_ids_to_tokens(end)!r}, where the starting model does not stop"
    )
    if is_adapted(model):
        return f"{what}; generate with the adapter and eos_token_id={settings.eos_token_id}"
    return f"{what}; the exported generation_config stops there too"
