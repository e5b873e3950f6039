"""What is known of groups from their lengths alone: tokens, attention pairs, whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.errors import UserError


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
        values: np.ndarray,  # (S,) of each completion
    ) -> np.ndarray:  # (B,)
        return np.bincount(self.owners, values, minlength=len(self.sequences))

    def tokens(self, shared: bool = True) -> np.ndarray:
        """(B,) tokens of a group whose prompt is there once, or before every completion."""
        tokens = self.prompts + self.totals(self.completions) if shared else self.totals(self.rows)
        return tokens.astype(np.int64)

    def attention_pairs(self, window: int | None = None, shared: bool = True) -> np.ndarray:
        """(B,) pairs of a query and a key that it attends to: causal, the last `window` keys at most."""
        whole, prompt = _causal_pairs(self.rows, window), _causal_pairs(self.prompts, window)
        return self.totals(whole - prompt[self.owners]) + prompt if shared else self.totals(whole)

    def padded_tokens(self, parts: int) -> int:
        """Tokens of all groups in `parts` batches, in order and as even as can be, a row for every completion
        with its prompt, padded to the longest of its batch."""
        batches = np.array_split(np.arange(len(self.sequences)), parts)
        longest = np.zeros(len(self.sequences), dtype=np.int64)
        np.maximum.at(longest, self.owners, self.rows)
        return int(sum(longest[batch].max() * self.sequences[batch].sum() for batch in batches if len(batch)))

    def at(
        self,
        order: np.ndarray,  # (b,)
    ) -> Shapes:
        """Some of the groups, in this order."""
        if not len(order):
            return shapes_of([])
        each = np.split(self.completions, np.cumsum(self.sequences)[:-1])
        return Shapes(
            self.prompts[order], self.sequences[order], np.concatenate([each[place] for place in order])
        )

    def without(
        self,
        left_out: np.ndarray,  # (S,) bool
    ) -> Shapes:
        """The same groups without some completions, and without the prompts of those that lose all."""
        sequences = self.totals(~left_out).astype(np.int64)
        return Shapes(np.where(sequences, self.prompts, 0), sequences, self.completions[~left_out])


def shapes_of(groups: Sequence[TokenGroup]) -> Shapes:
    """Of groups that have been read."""
    return Shapes(
        np.array([len(group.prompt) for group in groups], dtype=np.int64),
        np.array([len(group.completions) for group in groups], dtype=np.int64),
        np.array([len(x) for group in groups for x in group.completions], dtype=np.int64),
    )


def in_two_parts(
    is_first: np.ndarray,  # (B,) which of the groups
    first: Callable[[np.ndarray], Shapes],  # (places among B,) -> their shapes
    second: Callable[[np.ndarray], Shapes],
) -> Shapes:
    """The shapes of B groups, some of which are found in one way and the others in another."""
    places = [np.flatnonzero(is_first), np.flatnonzero(~is_first)]
    found = [find(of) for find, of in zip((first, second), places, strict=True) if len(of)]
    return joined(found).at(np.argsort(np.concatenate(places))) if found else shapes_of([])


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
