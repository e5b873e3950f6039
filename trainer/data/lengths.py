"""The lengths of groups, and what follows from them alone: tokens, attention pairs, whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError

Shared = bool | np.ndarray
"""Whether prompts are computed once for all their completions: all of them, or each of (B,) groups."""


@dataclass(frozen=True, order=True)
class PositionBorder:
    """A length beyond which a model encodes positions otherwise, so that longer completions of a prompt see
    another prompt than shorter ones."""

    length: int  # of the longest sequence with the usual encoding
    varies: bool  # beyond it every length has its own encoding; else all have one


@dataclass(frozen=True)
class Shapes:
    """The lengths of B groups with S completions."""

    prompts: np.ndarray  # (B,) tokens
    sequences: np.ndarray  # (B,) completions of each group
    completions: np.ndarray  # (S,) tokens of each completion, one group after another

    @cached_property
    def owners(self) -> np.ndarray:
        """(S,) the group of each completion."""
        return np.repeat(np.arange(len(self.sequences)), self.sequences)

    @cached_property
    def rows(self) -> np.ndarray:
        """(S,) tokens of each completion with its prompt before it."""
        return self.prompts[self.owners] + self.completions

    def totals(
        self,
        values: np.ndarray,  # (S,) one for each completion
    ) -> np.ndarray:  # (B,)
        """Sums over the completions of each group."""
        return np.bincount(self.owners, values, minlength=len(self.sequences))

    def shares_prompts(self, borders: Iterable[PositionBorder]) -> np.ndarray:
        """(B,) bool, whether all completions of a group see the prompt in one encoding of positions."""
        longest = np.zeros(len(self.sequences), dtype=np.int64)
        np.maximum.at(longest, self.owners, self.rows)
        shortest = longest.copy()
        np.minimum.at(shortest, self.owners, self.rows)
        shares = np.ones(len(self.sequences), dtype=bool)
        for border in borders:
            parted = shortest < longest if border.varies else shortest <= border.length
            shares &= ~(parted & (longest > border.length))
        return shares

    def tokens(self, shared: Shared = True) -> np.ndarray:
        """(B,) tokens of each group, with its prompt once if `shared`, else before every completion."""
        together, apart = self.prompts + self.totals(self.completions), self.totals(self.rows)
        return np.where(shared, together, apart).astype(np.int64)

    def attention_pairs(self, window: int | None = None, shared: Shared = True) -> np.ndarray:
        """(B,) pairs of a query and a key that it attends to: causal, the last `window` keys at most."""
        whole, prompt = _causal_pairs(self.rows, window), _causal_pairs(self.prompts, window)
        return np.where(shared, self.totals(whole - prompt[self.owners]) + prompt, self.totals(whole))

    def padded_tokens(self, num_batches: int) -> int:
        """Tokens with padding, if the groups were cut in order into equal batches, and every completion with
        its prompt were a row as long as the longest of its batch."""
        longest = np.zeros(len(self.sequences), dtype=np.int64)
        np.maximum.at(longest, self.owners, self.rows)
        tokens = 0
        for batch in np.array_split(np.arange(len(self.sequences)), num_batches):
            if len(batch):
                tokens += int(longest[batch].max() * self.sequences[batch].sum())
        return tokens

    def at(
        self,
        indices: np.ndarray,  # (b,)
    ) -> Shapes:
        """The groups at `indices`, in that order."""
        if not len(indices):
            return shapes_of([])
        of_groups = np.split(self.completions, np.cumsum(self.sequences)[:-1])
        completions = np.concatenate([of_groups[index] for index in indices])
        return Shapes(self.prompts[indices], self.sequences[indices], completions)

    def without(
        self,
        skipped: np.ndarray,  # (S,) bool
    ) -> Shapes:
        """These groups without the skipped completions and the prompts that lose all of theirs."""
        sequences = self.totals(~skipped).astype(np.int64)
        return Shapes(np.where(sequences, self.prompts, 0), sequences, self.completions[~skipped])


def shapes_of(groups: Sequence[TokenGroup]) -> Shapes:
    """The lengths of groups that have been read."""
    return Shapes(
        np.array([len(group.prompt) for group in groups], dtype=np.int64),
        np.array([len(group.completions) for group in groups], dtype=np.int64),
        np.array([len(x) for group in groups for x in group.completions], dtype=np.int64),
    )


def in_two_parts(
    is_first: np.ndarray,  # (B,) which of the groups
    first: Callable[[np.ndarray], Shapes],  # (n,) positions among the B -> the shapes of these groups
    second: Callable[[np.ndarray], Shapes],
) -> Shapes:
    """The shapes of B groups: `first` gives those of some, `second` those of the others."""
    positions = [np.flatnonzero(is_first), np.flatnonzero(~is_first)]
    parts = [
        shapes_at(of_part)
        for shapes_at, of_part in zip((first, second), positions, strict=True)
        if len(of_part)
    ]
    return joined(parts).at(np.argsort(np.concatenate(positions))) if parts else shapes_of([])


def joined(parts: Iterable[Shapes]) -> Shapes:
    """The groups of all parts, one part after another."""
    columns = zip(*((part.prompts, part.sequences, part.completions) for part in parts), strict=True)
    return Shapes(*map(np.concatenate, columns))


def _causal_pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """The sum over positions t of min(t + 1, window), for sequences of these lengths."""
    near = lengths if window is None else np.minimum(lengths, window)
    return near * (near + 1) // 2 + (lengths - near) * (window or 0)


def check_budget(
    lengths: np.ndarray,  # (G,) tokens of a packed row
    budget: int,
) -> None:
    """Raise UserError if one group exceeds the budget."""
    if len(lengths) and lengths.max() > budget:
        raise UserError(
            f"train.micro_batch_tokens: {budget} cannot hold a group of {lengths.max()} tokens; raise it or "
            "train.sequence_parallel_size (their product counts), lower data.max_length or, if groups hold "
            "many completions, set data.edges=best_worst or data.merge_prompts=false"
        )
