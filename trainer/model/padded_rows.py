"""Padded rows: every completion with its prompt in a row of its own, for models that cannot share one.

Layers that carry a state along the row (Mamba, linear attention) would carry it from one completion into the
next. Rows are padded on the right, which changes nothing for the tokens before, and run with the model's own
attention. Results are put back into the order of the packed row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from madpo.trainer.batches.packing import PackedBatch, Segment
from madpo.trainer.model.attention.segments import on_device
from madpo.trainer.model.positions import position_borders


class RowsOutput(NamedTuple):
    """The part of a backbone's output that is used, in the order of the packed row."""

    last_hidden_state: Tensor  # (1, N, H)
    router_logits: tuple[Tensor, ...] | None = None  # (N, experts) of each mixture


def run_rows(model: Any, batch: PackedBatch, **options: Any) -> RowsOutput:
    """The output of a backbone for a packed batch, computed in padded rows.

    A prompt's hidden states are taken from the row of its first completion; they are equal in all its rows.
    """
    index, cells = (on_device(x, batch.input_ids.device) for x in row_index(batch.segments))
    if position_borders(model):  # the rows' own positions: those of padding would make them longer
        options["position_ids"] = batch.position_ids[index]
    output: Any = model(input_ids=batch.input_ids[index], use_cache=False, **options)
    logits = getattr(output, "router_logits", None)
    # Mamba's residuals are float32 in any precision; like transformers, take its output to the head's.
    hidden = output.last_hidden_state.flatten(0, 1).index_select(0, cells).to(model.dtype)
    return RowsOutput(
        hidden[None],
        logits and tuple(layer.reshape(index.numel(), -1).index_select(0, cells) for layer in logits),
    )


def row_index(segments: tuple[Segment, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) the index in the packed row of each padded row's tokens, 0 in the padding; and (N,) the index
    among the B x T of every token of the packed row."""
    prompts = {s.prompt_start for s in segments if s.prompt_end > s.prompt_start}
    rows = [
        np.concatenate((np.arange(s.prompt_start, s.prompt_end), np.arange(s.start, s.end)))
        for s in segments
        if s.prompt_end > s.prompt_start or s.start not in prompts
    ]
    width = max(map(len, rows))
    index = np.zeros((len(rows), width), dtype=np.int64)
    cells = np.empty(segments[-1].end, dtype=np.int64)
    for number in reversed(range(len(rows))):  # backwards, so that a prompt's first copy stays
        row = rows[number]
        index[number, : len(row)] = row
        cells[row] = number * width + np.arange(len(row))
    return index, cells
