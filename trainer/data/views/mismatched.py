"""A view with mismatched completions: each group has another prompt's too, label 0, for KTO's KL term."""

from __future__ import annotations

from dataclasses import replace

import datasets
import numpy as np

from madpo.trainer.data.dataset import GroupDataset
from madpo.trainer.data.groups import ReferenceLogps
from madpo.trainer.data.lengths import Shapes
from madpo.trainer.data.order import permutation
from madpo.trainer.data.tokenise import TokenGroup, needed
from madpo.trainer.data.views.ragged import ranges, sums
from madpo.trainer.errors import UserError


class MismatchedDataset:
    """A view in which every group borrows the completions of its partner, after its own.

    A group's partner is the one before it on one random cycle through the data set. So each completion is
    borrowed once, partners stay the same during a run, and neighbours in the file, which may share a prompt,
    are seldom partners. A borrowed completion is cut where it would exceed `max_length`.
    """

    def __init__(self, groups: GroupDataset, seed: int, max_length: int) -> None:
        own = groups.counts
        if len(groups) < 2:
            raise UserError(f"{groups.name}: one prompt is too few, each needs the completion of another")
        if ((own.labelled > 0) & (own.labelled < own.sequences)).any():
            raise UserError(
                f"{groups.name}: groups have completions that win as often as they lose, which are neither "
                "desirable nor undesirable; set data.edges=best_worst"
            )
        self.name, self.fingerprint = groups.name, f"{groups.fingerprint}, mismatched by {seed}"
        self.reference: ReferenceLogps | None = None
        self._groups, self._max_length = groups, max_length
        cycle = permutation(len(groups), seed, epoch=0)
        self._partner = np.empty_like(cycle)
        self._partner[cycle] = np.roll(cycle, 1)
        room = max_length - (own.lengths - own.completion_tokens)
        borrowed_sequences = own.sequences[self._partner]
        full_lengths = groups.completion_lengths[ranges(own.sequences, self._partner)]
        cut_lengths = np.minimum(full_lengths, np.repeat(room, borrowed_sequences))
        borrowed_tokens = sums(cut_lengths, borrowed_sequences)
        whole_tokens, whole_scored = own.completion_tokens[self._partner], own.scored_tokens[self._partner]
        borrowed_scored = np.where(whole_scored < whole_tokens, whole_scored, borrowed_tokens)
        for index in np.flatnonzero((whole_scored < whole_tokens) & (borrowed_tokens < whole_tokens)):
            borrowed_scored[index] = sum(self[index].scored[own.sequences[index] :])
        self.counts = replace(
            own,
            lengths=own.lengths + borrowed_tokens,
            completion_tokens=own.completion_tokens + borrowed_tokens,
            scored_tokens=own.scored_tokens + borrowed_scored,
            sequences=own.sequences + borrowed_sequences,
        )

    @property
    def table(self) -> datasets.Dataset:
        return self._groups.table

    @property
    def rows(self) -> np.ndarray:
        return self._groups.rows

    @property
    def prompt_hashes(self) -> np.ndarray:
        return self._groups.prompt_hashes

    @property
    def margins(self) -> np.ndarray:
        return self._groups.margins

    @property
    def edge_weights(self) -> np.ndarray | None:
        return self._groups.edge_weights

    @property
    def completion_weights(self) -> np.ndarray | None:
        """(S,) weights of each group's own completions, and 1 for borrowed ones, whose loss is 0."""
        weights, own = self._groups.completion_weights, self._groups.counts.sequences
        if weights is None:
            return None
        starts = np.cumsum(self.counts.sequences) - self.counts.sequences
        places = np.repeat(starts - (np.cumsum(own) - own), own) + np.arange(own.sum())
        all_weights = np.ones(self.counts.sequences.sum())
        all_weights[places] = weights
        return all_weights

    def ease(self, order: str) -> np.ndarray | None:
        return self._groups.ease(order)

    def __len__(self) -> int:
        return len(self._groups)

    def shapes(self, indices: np.ndarray) -> Shapes:
        own, partners = self._groups.shapes(indices), self._groups.shapes(self._partner[indices])
        room = (self._max_length - own.prompts)[partners.owners]
        borrowed = np.minimum(partners.completions, room)
        owners = np.concatenate((own.owners, partners.owners))
        completions = np.concatenate((own.completions, borrowed))[np.argsort(owners, kind="stable")]
        return Shapes(own.prompts, own.sequences + partners.sequences, completions)

    def __getitem__(self, index: int) -> TokenGroup:
        own, partner = self._groups[int(index)], self._groups[int(self._partner[index])]
        room = self._max_length - len(own.prompt)
        borrowed = [completion[:room] for completion in partner.completions]
        labels = [*own.labels, *(0 for _ in borrowed)]
        weights = [*own.completion_weights, *(1.0 for _ in borrowed)] if own.completion_weights else []
        masks = needed([*own.whole_masks, *(mask[:room] for mask in partner.whole_masks)])
        return replace(
            own,
            completions=[*own.completions, *borrowed],
            labels=labels,
            completion_weights=weights,
            masks=masks,
        )
