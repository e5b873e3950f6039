"""Token groups -> packed batches: one row without padding, and the segments that say what attends to what.

For a group with prompt p (length a) and completions c1 .. ck the packed row is p c1 .. ck. Position
ids restart at a for every completion. A completion attends to the prompt and to itself, never to a
sibling. A scored token is a token of a completion that its mask, if there is one, does not leave out. The
position before it predicts it: the prompt's last position predicts the first token of every completion, so it
is k times among `scored_positions`.

Without prefix sharing, and for a single completion, the row is p c1 .. p ck, each p ci one segment.
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

from madpo.kernels.layout import GroupRange
from madpo.kernels.token_scores import TokenScores
from madpo.trainer.data.tokenise import TokenGroup, joined_weights
from madpo.trainer.objectives.scores import Scored

WHOLE = GroupRange(*(slice(0, None),) * 4)
"""All of a batch, whatever its size."""


class Segment(NamedTuple):
    """Queries [start, end) attend causally to themselves, and to the keys [prompt_start, prompt_end).

    The segments of a batch tile its row in order. A shared prompt is a segment of its own.
    """

    start: int
    end: int
    prompt_start: int
    prompt_end: int  # equal to prompt_start if the segment attends to itself only


@dataclass(frozen=True)
class PackedBatch:
    """Whole groups in one packed row. Tensors live on a device; counts and segments on the host.

    Where several ranks share a row, tokens and scored positions are those of this rank's slice
    (sequence_slices.py).
    """

    input_ids: Tensor  # (N,)
    position_ids: Tensor  # (N,)
    scored_positions: Tensor  # (M,) index into N of the position that predicts each target
    targets: Tensor  # (M,)
    ends: Tensor  # (S,) index into N of each completion's last token
    seq_lengths: Tensor  # (S,) scored tokens of each sequence
    chosen: Tensor  # (E,) index into S
    rejected: Tensor  # (E,)
    margins: Tensor  # (E,) NaN where the data set has none
    labels: Tensor  # (S,) 1 desirable, -1 undesirable, 0 neither or not known
    sequence_positions: Tensor  # (S,) position among all sequences of the step, over all ranks
    edge_positions: Tensor  # (E,) position among all edges of the step
    segments: tuple[Segment, ...]
    lengths: tuple[int, ...]  # seq_lengths on the host
    group_sequences: tuple[int, ...]  # (G,) completions of each group
    group_edges: tuple[int, ...]  # (G,) edges of each group
    scale: float = 1.0  # factor on the sum of item losses
    token_scale: float = 0.0  # factor on sums over packed tokens
    is_dummy: bool = False  # for a rank without groups (`dummy_batch`); counts for nothing
    edge_weights: Tensor | None = None  # (E,) the data's factors on the losses of edges
    completion_weights: Tensor | None = None  # (S,) on those of completions
    ref_token_logps: Tensor | None = None  # (M,) if the reference was scored before
    own_tokens: Tensor | None = None  # (m,) this slice's scored tokens, as indices into the row's M

    def without(
        self,
        skipped: np.ndarray,  # (S,) bool
    ) -> tuple[Self, Tensor]:
        """The batch without the skipped completions and the prompts that lose all of theirs, and (s,) which
        completions remain. On the host.

        It is for losses whose gradients are known, so it has no edges. One completion always remains, the
        shortest, because every rank must run the same number of batches.
        """
        is_kept = ~skipped
        if not is_kept.any():
            is_kept[np.argmin(self.lengths)] = True
        if is_kept.all():
            return self, torch.arange(len(self.lengths))
        old_positions, segments = _kept_segments(self.segments, is_kept)
        new_positions = np.full(len(self.input_ids), -1)
        new_positions[old_positions] = np.arange(len(old_positions))
        tokens, moved = torch.from_numpy(old_positions), torch.from_numpy(new_positions)
        scored = torch.from_numpy(np.flatnonzero(np.repeat(is_kept, self.lengths)))
        sequences = torch.from_numpy(np.flatnonzero(is_kept))
        owners = np.repeat(np.arange(len(self.group_sequences)), self.group_sequences)
        group_sequences = np.unique(owners[is_kept], return_counts=True)[1].tolist()
        batch = dataclasses.replace(
            self,
            input_ids=self.input_ids[tokens],
            position_ids=self.position_ids[tokens],
            scored_positions=moved[self.scored_positions[scored]],
            targets=self.targets[scored],
            ends=moved[self.ends[sequences]],
            seq_lengths=self.seq_lengths[sequences],
            chosen=self.chosen[:0],
            rejected=self.rejected[:0],
            margins=self.margins[:0],
            labels=self.labels[sequences],
            sequence_positions=self.sequence_positions[sequences],
            edge_positions=self.edge_positions[:0],
            segments=tuple(segments),
            lengths=tuple(self.lengths[sequence] for sequence in sequences.tolist()),
            group_sequences=tuple(group_sequences),
            group_edges=(0,) * len(group_sequences),
            edge_weights=None,
            completion_weights=None,
            ref_token_logps=None,
        )
        return batch, sequences

    def scored(
        self,
        tokens: TokenScores,  # (m,) of these groups' tokens
        group_range: GroupRange = WHOLE,
    ) -> Scored:
        """What an objective sees of a range of whole groups, or of the whole batch. Its sequences count from
        the first of the range."""
        first = group_range.sequences.start
        return Scored(
            tokens.token_logps,
            tokens.ref_token_logps,
            self.seq_lengths[group_range.sequences],
            self.chosen[group_range.edges] - first,
            self.rejected[group_range.edges] - first,
            self.margins[group_range.edges],
            self.labels[group_range.sequences],
            tokens.log_collisions,
            tokens.kl,
            None if self.edge_weights is None else self.edge_weights[group_range.edges],
            None if self.completion_weights is None else self.completion_weights[group_range.sequences],
        )

    def to(self, device: torch.device | str) -> Self:
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Self:
        """The batch in pinned memory, from which a GPU copies without making the host wait."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        pinned = {name: x.pin_memory() for name, x in tensors.items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **pinned)


def _kept_segments(
    segments: Sequence[Segment],
    is_kept: np.ndarray,  # (S,) completions
) -> tuple[np.ndarray, list[Segment]]:
    """(n,) the old positions of the tokens that stay: kept completions and their prompts. Then the
    segments of the new row."""
    shared = {segment.prompt_start for segment in segments if segment.prompt_start < segment.prompt_end}
    completions = [segment for segment in segments if segment.start not in shared]
    kept = {segment for segment, keep in zip(completions, is_kept, strict=True) if keep}
    prompts = {segment.prompt_start for segment in kept}
    new_starts: dict[int, int] = {}
    new_segments: list[Segment] = []
    old_positions = [np.empty(0, np.int64)]
    end = 0
    for segment in segments:
        remains = segment.start in prompts if segment.start in shared else segment in kept
        if not remains:
            continue
        start, end = end, end + segment.end - segment.start
        new_starts[segment.start] = start
        prompt_start = new_starts[segment.prompt_start]
        prompt_end = prompt_start + segment.prompt_end - segment.prompt_start
        new_segments.append(Segment(start, end, prompt_start, prompt_end))
        old_positions.append(np.arange(segment.start, segment.end))
    return np.concatenate(old_positions), new_segments


def pack(
    groups: Sequence[TokenGroup],
    scale: float = 1.0,
    is_dummy: bool = False,
    first_positions: Sequence[tuple[int, int]] | None = None,
    token_scale: float = 0.0,
    ref_logps: Sequence[np.ndarray] | None = None,  # (m,) float32 for each group
    prefix_sharing: bool | Sequence[bool] = True,
) -> PackedBatch:
    """Pack whole groups into one row, in the order given: each prompt once, or once before each completion.

    `prefix_sharing` is for all groups, or one value for each.
    `first_positions` holds, for each group, the positions of its first sequence and of its first edge in the
    step. Without it the groups are the whole step.
    """
    row = _tokens_of_row(groups, prefix_sharing)
    scored_positions, targets = _scored_tokens(row.completions)
    chosen, rejected, margins = _edges(groups)
    sequence_positions, edge_positions = _positions_in_step(groups, first_positions)
    lengths = [len(completion.scored) for completion in row.completions]
    return PackedBatch(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        scored_positions=scored_positions,
        targets=targets,
        ends=_indices([completion.end - 1 for completion in row.completions]),
        seq_lengths=_indices(lengths),
        chosen=chosen,
        rejected=rejected,
        margins=margins,
        labels=_labels(groups),
        sequence_positions=sequence_positions,
        edge_positions=edge_positions,
        segments=tuple(row.segments),
        lengths=tuple(lengths),
        group_sequences=tuple(len(group.completions) for group in groups),
        group_edges=tuple(len(group.edges) for group in groups),
        scale=scale,
        token_scale=token_scale,
        is_dummy=is_dummy,
        edge_weights=_weights([(group.edge_weights, len(group.edges)) for group in groups]),
        completion_weights=_weights([(x.completion_weights, len(x.completions)) for x in groups]),
        ref_token_logps=None if ref_logps is None else torch.from_numpy(np.concatenate(ref_logps)),
    )


class _Completion(NamedTuple):
    """A completion in the row: its tokens from `start`, which of them are scored, and where the prompt before
    it ends."""

    prompt_end: int
    start: int
    tokens: np.ndarray  # int64
    scored: np.ndarray  # int64, indices into the tokens

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class _Row(NamedTuple):
    input_ids: Tensor  # (N,)
    position_ids: Tensor  # (N,)
    segments: list[Segment]
    completions: list[_Completion]  # S


def _tokens_of_row(groups: Sequence[TokenGroup], prefix_sharing: bool | Sequence[bool]) -> _Row:
    of_groups = [prefix_sharing] * len(groups) if isinstance(prefix_sharing, bool) else prefix_sharing
    ids: list[np.ndarray] = []
    position_ids: list[np.ndarray] = []
    segments: list[Segment] = []
    completions: list[_Completion] = []
    end = 0
    for group, may_share in zip(groups, of_groups, strict=True):
        shared = may_share and len(group.completions) > 1
        prompt_length = len(group.prompt)
        prompt_start = prompt_end = end
        for number, completion in enumerate(group.completions):
            if number == 0 or not shared:
                prompt_start, prompt_end = end, end + prompt_length
                ids.append(_int64(group.prompt))
                position_ids.append(np.arange(prompt_length))
                end = prompt_end
                if shared:
                    segments.append(Segment(prompt_start, prompt_end, prompt_start, prompt_start))
            start, end = end, end + len(completion)
            ids.append(_int64(completion))
            position_ids.append(np.arange(prompt_length, prompt_length + len(completion)))
            if shared:
                segments.append(Segment(start, end, prompt_start, prompt_end))
            else:
                segments.append(Segment(prompt_start, end, prompt_start, prompt_start))
            scored = np.flatnonzero(group.masks[number]) if group.masks else np.arange(len(completion))
            completions.append(_Completion(prompt_end, start, ids[-1], scored))
    return _Row(_concatenated(ids), _concatenated(position_ids), segments, completions)


def _scored_tokens(completions: Sequence[_Completion]) -> tuple[Tensor, Tensor]:
    """(M,) the position that predicts each scored token, and (M,) that token."""
    predicting: list[np.ndarray] = []
    for completion in completions:
        before = completion.start + completion.scored - 1
        predicting.append(np.where(completion.scored == 0, completion.prompt_end - 1, before))
    return _concatenated(predicting), _concatenated([x.tokens[x.scored] for x in completions])


def _edges(groups: Sequence[TokenGroup]) -> tuple[Tensor, Tensor, Tensor]:
    """(E,) chosen, rejected and margins."""
    chosen: list[int] = []
    rejected: list[int] = []
    margins: list[float] = []
    first_sequence = 0
    for group in groups:
        for winner, loser, margin in group.edges:
            chosen.append(first_sequence + winner)
            rejected.append(first_sequence + loser)
            margins.append(math.nan if margin is None else margin)
        first_sequence += len(group.completions)
    return _indices(chosen), _indices(rejected), torch.tensor(margins, dtype=torch.float64)


def _weights(parts: Sequence[tuple[list[float], int]]) -> Tensor | None:
    """The weights of all groups, each given with the number it should have; None if no group has any."""
    weights = joined_weights(parts)
    return torch.tensor(weights, dtype=torch.float64) if weights else None


def _labels(groups: Sequence[TokenGroup]) -> Tensor:
    """(S,) labels; 0 for the completions of a group without."""
    labels: list[int] = []
    for group in groups:
        labels += group.labels or [0] * len(group.completions)
    return _indices(labels)


def _positions_in_step(
    groups: Sequence[TokenGroup], first_positions: Sequence[tuple[int, int]] | None
) -> tuple[Tensor, Tensor]:
    """(S,) and (E,): the place of each sequence and edge in the order of the whole step."""
    sequences: list[int] = []
    edges: list[int] = []
    for index, group in enumerate(groups):
        if first_positions is None:
            first_sequence, first_edge = len(sequences), len(edges)
        else:
            first_sequence, first_edge = first_positions[index]
        sequences += range(first_sequence, first_sequence + len(group.completions))
        edges += range(first_edge, first_edge + len(group.edges))
    return _indices(sequences), _indices(edges)


def _int64(tokens: Sequence[int]) -> np.ndarray:
    return np.asarray(tokens, dtype=np.int64)


def _indices(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def _concatenated(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, np.int64))


def dummy_batch(with_reference: bool = False) -> PackedBatch:
    """The smallest batch, with weight 0, for a rank without groups. Every rank must run the same number of
    forward and backward passes, or ZeRO-3's collectives hang."""
    ref_logps = [np.zeros(1, np.float32)] if with_reference else None
    batch = pack([TokenGroup([0], [[0]], [])], scale=0.0, is_dummy=True, ref_logps=ref_logps)
    return dataclasses.replace(batch, sequence_positions=batch.sequence_positions[:0])
