"""Groups and their log-probs, packed and padded, for the tests of attention."""

from __future__ import annotations

from typing import Any

import torch
from harness import random_groups

from madpo.trainer.batches.packing import pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.model.attention.prefix_sharing import SegmentTable
from madpo.trainer.model.backbone import output_head, scored_hidden
from madpo.trainer.objectives.scores import segment_sum


def packed_logps(model: Any, groups: list[TokenGroup], prefix_sharing: bool = True) -> torch.Tensor:
    """(S,)"""
    batch = pack(groups, prefix_sharing=prefix_sharing).to(next(model.parameters()).device)
    hidden = scored_hidden(model, batch, SegmentTable(batch.segments))
    logits = output_head(model).transform(model.lm_head(hidden))
    tokens = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return segment_sum(tokens, batch.seq_lengths)


def padded_logps(model: Any, groups: list[TokenGroup]) -> torch.Tensor:
    """(S,) each completion alone behind its prompt, padded on the right as a batch would be."""
    out = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt + completion + [0] * 5])
            mask = torch.tensor([[1] * (ids.shape[1] - 5) + [0] * 5])
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
            first = len(group.prompt) - 1
            rows = logits[first : first + len(completion)].log_softmax(-1)
            out.append(rows.gather(1, torch.tensor(completion)[:, None]).double().sum())
    return torch.stack(out)


def mixed_groups() -> list[TokenGroup]:
    """One, two and seven completions; a prompt of one token; a completion of one token."""
    one, seven = random_groups(2, 1, completions=1), random_groups(1, 2, completions=7)
    short = TokenGroup([5], [[7], [9, 11, 13]], [(0, 1, None)])
    return [*random_groups(3), *one, short, *seven]
