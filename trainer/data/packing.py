"""Token groups -> packed batches: rows without padding, and the table that tells what sees what.

For a group with prompt p (length a) and completions c1 .. ck the packed row is p c1 .. ck. Position
ids restart at a for every completion. A completion attends to the prompt and to itself, never to a
sibling. A scored row is the position that predicts a completion token; the prompt's last position
predicts the first token of every completion, so it appears k times.

Without sharing, and for a completion alone, the row is p c1 .. p ck, where each p ci is one segment.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError


class Segment(NamedTuple):
    """Queries [start, end) attend causally to themselves and to keys [prompt_start, prompt_end).

    The segments of a batch tile its row in order, and a prompt that is shared is a segment of its own.
    """

    start: int
    end: int
    prompt_start: int
    prompt_end: int  # equal to prompt_start for what sees itself only


@dataclass(frozen=True)
class PackedBatch:
    """Whole groups in one row. Tensors live on a device; counts and the segment table on the host."""

    input_ids: Tensor  # (N,)
    position_ids: Tensor  # (N,)
    rows: Tensor  # (M,) index into N of the position that predicts each target
    targets: Tensor  # (M,)
    ends: Tensor  # (S,) index into N of each completion's last token
    seq_lengths: Tensor  # (S,) scored rows of each sequence
    winners: Tensor  # (E,) index into S
    losers: Tensor  # (E,)
    margins: Tensor  # (E,) NaN where the data set has none
    labels: Tensor  # (S,) 1 desirable, -1 undesirable, 0 neither or not known
    sequence_places: Tensor  # (S,) position among all sequences of the step, over all ranks
    edge_places: Tensor  # (E,) position among its edges
    segments: tuple[Segment, ...]
    lengths: tuple[int, ...]  # seq_lengths on the host
    group_sequences: tuple[int, ...]  # (G,) completions of each group
    group_edges: tuple[int, ...]  # (G,) edges of each group
    scale: float = 1.0  # factor on the sum of item losses
    token_scale: float = 0.0  # factor on what is summed over packed tokens
    is_filler: bool = False  # keeps a rank in step that has no groups left; counts for nothing
    slopes: Tensor | None = None  # (S,) of the losses' sum in the sequences' log-probs, where known before

    def to(self, device: torch.device | str) -> Self:
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


def pack(
    groups: Sequence[TokenGroup],
    scale: float = 1.0,
    is_filler: bool = False,
    places: Sequence[tuple[int, int]] | None = None,
    token_scale: float = 0.0,
    prefix_sharing: bool = True,
) -> PackedBatch:
    """Pack whole groups into one row, in the order given; each prompt once, or once for each completion.

    `places` says where the first sequence and the first edge of each group stand among those of the step;
    without it the groups are the step.
    """
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    ends: list[int] = []
    segments: list[Segment] = []
    lengths: list[int] = []
    edges: list[tuple[int, int, float]] = []
    labels: list[int] = []
    sequence_places: list[int] = []
    edge_places: list[int] = []
    for index, group in enumerate(groups):
        first_sequence, first_edge = places[index] if places else (len(lengths), len(edges))
        sequence_places += range(first_sequence, first_sequence + len(group.completions))
        edge_places += range(first_edge, first_edge + len(group.edges))
        labels += group.labels or [0] * len(group.completions)
        first, shared = len(lengths), prefix_sharing and len(group.completions) > 1
        prompt_start = prompt_end = 0
        for number, completion in enumerate(group.completions):
            if number == 0 or not shared:
                prompt_start, prompt_end = len(ids), len(ids) + len(group.prompt)
                ids += group.prompt
                positions += range(len(group.prompt))
                if shared:
                    segments.append(Segment(prompt_start, prompt_end, prompt_start, prompt_start))
            start = len(ids)
            ids += completion
            positions += range(len(group.prompt), len(group.prompt) + len(completion))
            if shared:
                segments.append(Segment(start, len(ids), prompt_start, prompt_end))
            else:
                segments.append(Segment(prompt_start, len(ids), prompt_start, prompt_start))
            rows += [prompt_end - 1, *range(start, len(ids) - 1)]
            targets += completion
            ends.append(len(ids) - 1)
            lengths.append(len(completion))
        edges += [
            (first + winner, first + loser, math.nan if margin is None else margin)
            for winner, loser, margin in group.edges
        ]
    winners, losers, margins = zip(*edges, strict=True) if edges else ((), (), ())
    long = torch.int64
    return PackedBatch(
        input_ids=torch.tensor(ids, dtype=long),
        position_ids=torch.tensor(positions, dtype=long),
        rows=torch.tensor(rows, dtype=long),
        targets=torch.tensor(targets, dtype=long),
        ends=torch.tensor(ends, dtype=long),
        seq_lengths=torch.tensor(lengths, dtype=long),
        winners=torch.tensor(winners, dtype=long),
        losers=torch.tensor(losers, dtype=long),
        margins=torch.tensor(margins, dtype=torch.float64),
        labels=torch.tensor(labels, dtype=long),
        sequence_places=torch.tensor(sequence_places, dtype=long),
        edge_places=torch.tensor(edge_places, dtype=long),
        segments=tuple(segments),
        lengths=tuple(lengths),
        group_sequences=tuple(len(group.completions) for group in groups),
        group_edges=tuple(len(group.edges) for group in groups),
        scale=scale,
        token_scale=token_scale,
        is_filler=is_filler,
    )


def computed_tokens(
    lengths: np.ndarray,  # (G,) prompt and completions
    completion_tokens: np.ndarray,  # (G,)
    sequences: np.ndarray,  # (G,)
    prefix_sharing: bool,
) -> np.ndarray:
    """(G,) the length of each group's part of a packed row."""
    if prefix_sharing:
        return lengths
    return lengths + (np.maximum(sequences, 1) - 1) * (lengths - completion_tokens)


def filler() -> PackedBatch:
    """A smallest batch with weight zero, for a rank without groups: every rank must run the same
    number of forward and backward passes, or ZeRO-3's collectives hang."""
    batch = pack([TokenGroup([0], [[0]], [])], scale=0.0, is_filler=True)
    return dataclasses.replace(batch, sequence_places=batch.sequence_places[:0])


def plan_micro_batches(
    lengths: np.ndarray,  # (B,) packed tokens of each group of the step
    budget: int,
    world_size: int,
) -> list[list[list[int]]]:
    """Spread a step's groups over ranks and micro-batches: [rank][micro] -> positions into `lengths`.

    The fewest micro-batches (the same number on every rank) whose tokens stay within `budget`; the
    longest groups are placed first, each into the emptiest bin, so that ranks finish together.
    Deterministic. Raises ValueError if one group exceeds the budget.
    """
    check_budget(lengths, budget)
    order = np.argsort(-lengths, kind="stable")
    micro_batches = max(1, -(-int(lengths.sum()) // (budget * world_size)))
    while True:
        bins = _fill(lengths, order, budget, micro_batches * world_size)
        if bins is not None:
            return [bins[rank::world_size] for rank in range(world_size)]
        micro_batches += 1


def check_budget(lengths: np.ndarray, budget: int) -> None:
    """Raise ValueError if one group exceeds the budget."""
    if len(lengths) and lengths.max() > budget:
        raise UserError(
            f"train.micro_batch_tokens: {budget} cannot hold a group of {lengths.max()} tokens; raise it, "
            "lower data.max_length or, if groups hold many completions, set data.edges=best_worst"
        )


def _fill(lengths: np.ndarray, order: np.ndarray, budget: int, num_bins: int) -> list[list[int]] | None:
    loads = np.zeros(num_bins, dtype=np.int64)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for index in order:
        target = int(loads.argmin())
        if loads[target] + lengths[index] > budget:
            return None
        loads[target] += lengths[index]
        bins[target].append(int(index))
    return [sorted(positions) for positions in bins]
