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

from madpo.kernels.layout import GroupRange
from madpo.kernels.token_scores import TokenScores
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.objectives.scores import Scored

WHOLE = GroupRange(*(slice(0, None),) * 4)
"""All of a batch, whatever its size."""


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
    """Whole groups in one row. Tensors live on a device; counts and the segment table on the host.

    Of a row that several ranks share, tokens and scored rows are those of one slice (sequence_slices.py).
    """

    input_ids: Tensor  # (N,)
    position_ids: Tensor  # (N,)
    scored_positions: Tensor  # (M,) index into N of the position that predicts each target
    targets: Tensor  # (M,)
    ends: Tensor  # (S,) index into N of each completion's last token
    seq_lengths: Tensor  # (S,) scored rows of each sequence
    chosen: Tensor  # (E,) index into S
    rejected: Tensor  # (E,)
    margins: Tensor  # (E,) NaN where the data set has none
    labels: Tensor  # (S,) 1 desirable, -1 undesirable, 0 neither or not known
    sequence_positions: Tensor  # (S,) position among all sequences of the step, over all ranks
    edge_positions: Tensor  # (E,) position among its edges
    segments: tuple[Segment, ...]
    lengths: tuple[int, ...]  # seq_lengths on the host
    group_sequences: tuple[int, ...]  # (G,) completions of each group
    group_edges: tuple[int, ...]  # (G,) edges of each group
    scale: float = 1.0  # factor on the sum of item losses
    token_scale: float = 0.0  # factor on what is summed over packed tokens
    is_dummy: bool = False  # keeps a rank in step that has no groups left; counts for nothing
    edge_weights: Tensor | None = None  # (E,) in place of those that the objective gives
    ref_token_logps: Tensor | None = None  # (M,) where the reference was scored before
    own_tokens: Tensor | None = None  # (m,) of a row in slices: which of the M rows these `rows` are

    def without(
        self,
        left_out: np.ndarray,  # (S,) bool
    ) -> tuple[Self, Tensor]:
        """The batch, on the host, without some completions and the prompts that lose all of theirs; and
        (s,) which completions are kept.

        For losses whose gradients are known: what compares completions goes. If none would be left, the
        shortest stays, because every rank must run as many batches.
        """
        is_kept = ~left_out
        if not is_kept.any():
            is_kept[np.argmin(self.lengths)] = True
        if is_kept.all():
            return self, torch.arange(len(self.lengths))
        tokens, segments = _left(self.segments, is_kept)
        new_places = np.full(len(self.input_ids), -1)
        new_places[tokens] = np.arange(len(tokens))
        rows, sequences = np.flatnonzero(np.repeat(is_kept, self.lengths)), np.flatnonzero(is_kept)
        of_tokens, of_rows, of_sequences, places = map(
            torch.from_numpy, (tokens, rows, sequences, new_places)
        )
        owners = np.repeat(np.arange(len(self.group_sequences)), self.group_sequences)
        sizes = np.unique(owners[is_kept], return_counts=True)[1].tolist()
        batch = dataclasses.replace(
            self,
            input_ids=self.input_ids[of_tokens],
            position_ids=self.position_ids[of_tokens],
            scored_positions=places[self.scored_positions[of_rows]],
            targets=self.targets[of_rows],
            ends=places[self.ends[of_sequences]],
            seq_lengths=self.seq_lengths[of_sequences],
            chosen=self.chosen[:0],
            rejected=self.rejected[:0],
            margins=self.margins[:0],
            labels=self.labels[of_sequences],
            sequence_positions=self.sequence_positions[of_sequences],
            edge_positions=self.edge_positions[:0],
            segments=tuple(segments),
            lengths=tuple(self.lengths[place] for place in sequences),
            group_sequences=tuple(sizes),
            group_edges=(0,) * len(sizes),
            edge_weights=None,
            ref_token_logps=None,
        )
        return batch, of_sequences

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
        )

    def to(self, device: torch.device | str) -> Self:
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Self:
        """The same in memory from which a GPU copies without making the host wait."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        pinned = {name: x.pin_memory() for name, x in tensors.items() if isinstance(x, Tensor)}
        return dataclasses.replace(self, **pinned)


def _left(
    segments: Sequence[Segment],
    is_kept: np.ndarray,  # (S,) completions
) -> tuple[np.ndarray, list[Segment]]:
    """The tokens of the completions kept, and of their prompts, as places (n,); and their segments there."""
    shared = {segment.prompt_start for segment in segments if segment.prompt_start < segment.prompt_end}
    completions = [segment for segment in segments if segment.start not in shared]
    kept = {segment for segment, keep in zip(completions, is_kept, strict=True) if keep}
    prompts = {segment.prompt_start for segment in kept}
    new_starts: dict[int, int] = {}
    tokens, out, end = [np.empty(0, np.int64)], list[Segment](), 0
    for segment in segments:
        start, old_end, prompt_start, prompt_end = segment
        if not (start in prompts if start in shared else segment in kept):
            continue
        new_starts[start] = end
        prompt = new_starts[prompt_start]
        out.append(Segment(end, end + old_end - start, prompt, prompt + prompt_end - prompt_start))
        tokens.append(np.arange(start, old_end))
        end += old_end - start
    return np.concatenate(tokens), out


def pack(
    groups: Sequence[TokenGroup],
    scale: float = 1.0,
    is_dummy: bool = False,
    places: Sequence[tuple[int, int]] | None = None,
    token_scale: float = 0.0,
    ref_logps: Sequence[np.ndarray] | None = None,  # of each group (m,) float32
    prefix_sharing: bool = True,
) -> PackedBatch:
    """Pack whole groups into one row, in the order given; each prompt once, or once for each completion.

    `places` says where the first sequence and the first edge of each group stand among those of the step;
    without it the groups are the step.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    ends: list[int] = []
    segments: list[Segment] = []
    lengths: list[int] = []
    edges: list[tuple[int, int, float]] = []
    labels: list[int] = []
    weights: list[float] = []
    sequence_positions: list[int] = []
    edge_positions: list[int] = []
    end = 0
    for index, group in enumerate(groups):
        first_sequence, first_edge = places[index] if places else (len(lengths), len(edges))
        sequence_positions += range(first_sequence, first_sequence + len(group.completions))
        edge_positions += range(first_edge, first_edge + len(group.edges))
        weights += group.weights
        labels += group.labels or [0] * len(group.completions)
        first, shared = len(lengths), prefix_sharing and len(group.completions) > 1
        prompt_start = prompt_end = end
        for number, completion in enumerate(group.completions):
            if number == 0 or not shared:
                prompt_start, prompt_end = end, end + len(group.prompt)
                ids.append(_whole(group.prompt))
                positions.append(np.arange(len(group.prompt)))
                if shared:
                    segments.append(Segment(prompt_start, prompt_end, prompt_start, prompt_start))
                end = prompt_end
            start, end = end, end + len(completion)
            ids.append(_whole(completion))
            positions.append(np.arange(len(group.prompt), len(group.prompt) + len(completion)))
            if shared:
                segments.append(Segment(start, end, prompt_start, prompt_end))
            else:
                segments.append(Segment(prompt_start, end, prompt_start, prompt_start))
            rows += [np.array([prompt_end - 1]), np.arange(start, end - 1)]
            targets.append(ids[-1])
            ends.append(end - 1)
            lengths.append(len(completion))
        edges += [
            (first + winner, first + loser, math.nan if margin is None else margin)
            for winner, loser, margin in group.edges
        ]
    chosen, rejected, margins = zip(*edges, strict=True) if edges else ((), (), ())
    long = torch.int64
    return PackedBatch(
        input_ids=_joined(ids),
        position_ids=_joined(positions),
        scored_positions=_joined(rows),
        targets=_joined(targets),
        ends=torch.tensor(ends, dtype=long),
        seq_lengths=torch.tensor(lengths, dtype=long),
        chosen=torch.tensor(chosen, dtype=long),
        rejected=torch.tensor(rejected, dtype=long),
        margins=torch.tensor(margins, dtype=torch.float64),
        labels=torch.tensor(labels, dtype=long),
        sequence_positions=torch.tensor(sequence_positions, dtype=long),
        edge_positions=torch.tensor(edge_positions, dtype=long),
        segments=tuple(segments),
        lengths=tuple(lengths),
        group_sequences=tuple(len(group.completions) for group in groups),
        group_edges=tuple(len(group.edges) for group in groups),
        scale=scale,
        token_scale=token_scale,
        is_dummy=is_dummy,
        edge_weights=torch.tensor(weights, dtype=torch.float64) if weights else None,
        ref_token_logps=None if ref_logps is None else torch.from_numpy(np.concatenate(ref_logps)),
    )


def _whole(numbers: Sequence[int]) -> np.ndarray:
    return np.asarray(numbers, dtype=np.int64)


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, np.int64))


def dummy_batch(with_reference: bool = False) -> PackedBatch:
    """A smallest batch with weight zero, for a rank without groups: every rank must run the same
    number of forward and backward passes, or ZeRO-3's collectives hang."""
    ref_logps = [np.zeros(1, np.float32)] if with_reference else None
    batch = pack([TokenGroup([0], [[0]], [])], scale=0.0, is_dummy=True, ref_logps=ref_logps)
    return dataclasses.replace(batch, sequence_positions=batch.sequence_positions[:0])
