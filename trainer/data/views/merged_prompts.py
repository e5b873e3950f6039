"""Examples with one prompt joined into one group: the prompt, and completions they share, are scored once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import xxhash

from madpo.trainer.data.groups import GroupCounts, ReferenceLogps, TabledGroups, TokenDataset, ease_of
from madpo.trainer.data.lengths import Shapes, in_two_parts, shapes_of
from madpo.trainer.data.tokenise import TokenGroup, joined_weights, labels_of, needed
from madpo.trainer.data.views.ragged import ranges
from madpo.trainer.objectives.base import Item
from madpo.trainer.objectives.build import BoundObjective


def merge_prompts(
    groups: TabledGroups, objective: BoundObjective, most_tokens: int
) -> TabledGroups | MergedDataset:
    """Join the groups of one prompt (equal token ids). Returns `groups` itself if there are none to join.

    No edge and no label is lost: an edge that two examples have counts twice. Under objectives of pairs a
    completion that several examples have is scored once. Under objectives of single completions every copy is
    an item of its own, and only the prompt is shared. Supervised examples stay as they are. A joined group
    has at most `most_tokens`; an example that would exceed it opens another group of the prompt. An example
    that a mixture repeats stays repeated: its second copy joins second copies only.
    """
    if objective.supervised:
        return groups
    share_completions = objective.item is Item.EDGE
    plan = _plan(groups, most_tokens, share_completions)
    if (plan.leaders == np.arange(len(groups))).all():
        return groups
    return MergedDataset(groups, plan, share_completions)


def repeated_prompts(groups: TokenDataset) -> dict[str, int]:
    """For the report: how many examples repeat an earlier one's prompt, and the tokens of these prompts;
    empty if none does."""
    # An example that a mixture repeats counts once: its copies are not merged with each other.
    keys = np.stack((groups.prompt_hashes, groups.rows), axis=1)
    examples = np.unique(keys, axis=0, return_index=True)[1]
    repeats = np.zeros(len(groups), dtype=bool)
    repeats[examples] = True
    first_of_prompt = np.unique(groups.prompt_hashes[examples], return_index=True)[1]
    repeats[examples[first_of_prompt]] = False
    if not repeats.any():
        return {}
    prompts = groups.counts.lengths - groups.counts.completion_tokens
    return {
        "rows_of_known_prompts": int(repeats.sum()),
        "tokens_of_known_prompts": int(prompts[repeats].sum()),
    }


class MergePlan(NamedTuple):
    """Which group each of R examples joins, and what it adds to the group's counts."""

    leaders: np.ndarray  # (R,) the first example of its group
    tokens: np.ndarray  # (R,) packed
    completion_tokens: np.ndarray  # (R,)
    scored_tokens: np.ndarray  # (R,)
    sequences: np.ndarray  # (R,)
    labelled: np.ndarray  # (R,)


class MergedDataset:
    """R examples seen as G groups; a group stands where its first example stood. With `share_completions` a
    completion that several examples have is kept once."""

    def __init__(self, groups: TabledGroups, plan: MergePlan, share_completions: bool) -> None:
        content = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(plan.leaders, np.int64).tobytes())
        self.name, self.fingerprint = groups.name, f"{groups.fingerprint}, merged {content}"
        self.reference: ReferenceLogps | None = None
        self._groups, self._share_completions = groups, share_completions
        self._members = np.argsort(plan.leaders, kind="stable")  # (R,) one group after another
        leads = plan.leaders[self._members] == self._members
        self._starts = np.append(np.flatnonzero(leads), len(leads))  # (G + 1,)
        self.counts = GroupCounts.all_computed(
            lengths=self._sums(plan.tokens),
            completion_tokens=self._sums(plan.completion_tokens),
            scored_tokens=self._sums(plan.scored_tokens),
            sequences=self._sums(plan.sequences),
            edges=self._sums(groups.counts.edges),
            labelled=self._sums(plan.labelled),
        )

    def _sums(self, counts: np.ndarray) -> np.ndarray:
        """(R,) counts of the examples -> (G,) of the groups."""
        return np.add.reduceat(counts[self._members], self._starts[:-1])

    @property
    def report(self) -> dict[str, int]:
        """The numbers of the report that merging changes."""
        return {
            "groups": len(self),
            "tokens": int(self.counts.lengths.sum()),
            "rows_merged": len(self._groups) - len(self),
            "tokens_saved_by_merging": int(self._groups.counts.lengths.sum() - self.counts.lengths.sum()),
        }

    @property
    def rows(self) -> np.ndarray:
        """(G,) the line or number of each group's first example."""
        return self._groups.rows[self._members[self._starts[:-1]]]

    @property
    def prompt_hashes(self) -> np.ndarray:
        return self._groups.prompt_hashes[self._members[self._starts[:-1]]]

    @property
    def margins(self) -> np.ndarray:
        return self._groups.margins[ranges(self._groups.counts.edges, self._members)]

    @property
    def edge_weights(self) -> np.ndarray | None:
        weights = self._groups.edge_weights
        return None if weights is None else weights[ranges(self._groups.counts.edges, self._members)]

    @property
    def completion_weights(self) -> np.ndarray | None:
        assert not self._share_completions, "a shared completion has no weight of its own"
        weights = self._groups.completion_weights
        return None if weights is None else weights[ranges(self._groups.counts.sequences, self._members)]

    def shapes(self, indices: np.ndarray) -> Shapes:
        """The lengths of the groups at `indices`. Joined ones are read: only tokens show what is shared."""
        firsts, counts = self._starts[indices], np.diff(self._starts)[indices]
        return in_two_parts(
            counts == 1,
            lambda at: self._groups.shapes(self._members[firsts[at]]),
            lambda at: shapes_of([self[int(index)] for index in indices[at]]),
        )

    def ease(self, order: str) -> np.ndarray | None:
        return ease_of(self.name, order, self.margins, self.counts.edges) if order != "shuffled" else None

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> TokenGroup:
        members = self._members[self._starts[index] : self._starts[index + 1]]
        return joined([self._groups[int(member)] for member in members], self._share_completions)


def joined(parts: Sequence[TokenGroup], share_completions: bool) -> TokenGroup:
    """One group of several with the same prompt. `share_completions`: a completion that an earlier part has
    is not repeated, and labels follow from all edges together."""
    if len(parts) == 1:
        return parts[0]
    completions: list[list[int]] = []
    masks: list[list[bool]] = []
    edges: list[tuple[int, int, float | None]] = []
    indices = CompletionIndices(share_completions)
    for part in parts:
        pairs = list(zip(part.completions, part.whole_masks, strict=True))
        new_index = indices.add([(tuple(completion), tuple(mask)) for completion, mask in pairs])
        for (completion, mask), index in zip(pairs, new_index, strict=True):
            if index == len(completions):
                completions.append(completion)
                masks.append(mask)
        edges += [(new_index[chosen], new_index[rejected], margin) for chosen, rejected, margin in part.edges]
    if share_completions:
        labels, completion_weights = labels_of(edges, len(completions)), []
    else:
        labels = [label for part in parts for label in part.labels]
        own = [(part.completion_weights, len(part.completions)) for part in parts]
        completion_weights = joined_weights(own)
    return TokenGroup(
        parts[0].prompt,
        completions,
        edges,
        labels,
        joined_weights([(part.edge_weights, len(part.edges)) for part in parts]),
        completion_weights,
        boundary_cut=max(part.boundary_cut for part in parts),
        truncated=sum(part.truncated for part in parts),
        equal=sum(part.equal for part in parts),
        masks=needed(masks),
    )


class CompletionIndices:
    """Gives the completions of parts their indices in the joined group."""

    def __init__(self, share_completions: bool) -> None:
        self.of_earlier_parts: dict[Hashable, int] = {}  # stays empty unless completions are shared
        self._share_completions, self._count = share_completions, 0

    def add(self, completions: Sequence[Hashable]) -> list[int]:
        """The index of each completion of the next part: that of an equal one in an earlier part if they are
        shared, else a new one. Equal completions of one part stay apart."""
        indices: list[int] = []
        for completion in completions:
            index = self.of_earlier_parts.get(completion)
            if index is None:
                index = self._count
                self._count += 1
            indices.append(index)
        if self._share_completions:
            for completion, index in zip(completions, indices, strict=True):
                self.of_earlier_parts.setdefault(completion, index)
        return indices


@dataclass
class _OpenGroup:
    """A group that further examples of its prompt may join."""

    leader: int
    tokens: int  # packed
    indices: CompletionIndices
    wins: Counter[int] = field(default_factory=Counter)  # completion -> edges won less edges lost


def _plan(groups: TabledGroups, most_tokens: int, share_completions: bool) -> MergePlan:
    """One example after another joins the last group of its prompt, or opens another if that would grow too
    large."""
    prompts = _numbered(digest for column in _read(groups.table, "prompt") for digest in _digests(column))
    repeated = np.flatnonzero(np.bincount(prompts)[prompts] > 1)  # examples that share their prompt
    leaders = np.arange(len(groups))
    tokens = groups.counts.lengths.astype(np.int64)
    completion_tokens = groups.counts.completion_tokens.astype(np.int64)
    scored_tokens = groups.counts.scored_tokens.astype(np.int64)
    sequences = groups.counts.sequences.astype(np.int64)
    labelled = groups.counts.labelled.astype(np.int64)
    copies: Counter[tuple[Any, ...]] = Counter()  # how often an example was seen, which a mixture may repeat
    last: dict[tuple[int, int], _OpenGroup] = {}  # (prompt, number of the copy) -> its last group
    opened: list[_OpenGroup] = []
    rows = groups.rows[repeated].tolist()
    examples = _examples(groups.table, repeated)
    for index, row, example in zip(repeated.tolist(), rows, examples, strict=True):
        prompt = int(prompts[index])
        identity = (prompt, row, *example.digests)
        key = (prompt, copies[identity])
        copies[identity] += 1
        group = last.get(key)
        known = group.indices.of_earlier_parts if group is not None else {}
        shared = [i for i, digest in enumerate(example.digests) if digest in known]
        added = int(completion_tokens[index]) - sum(example.lengths[i] for i in shared)
        if group is None or group.tokens + added > most_tokens:
            group = _OpenGroup(index, int(tokens[index]), CompletionIndices(share_completions))
            last[key] = group
            opened.append(group)
        else:
            leaders[index] = group.leader
            tokens[index] = completion_tokens[index] = added
            scored_tokens[index] -= sum(example.scored[i] for i in shared)
            sequences[index] -= len(shared)
            group.tokens += added
        new_index = group.indices.add(example.digests)
        group.wins.update(new_index[chosen] for chosen in example.chosen)
        group.wins.subtract(new_index[rejected] for rejected in example.rejected)
    if share_completions:
        labelled[repeated] = 0
        for group in opened:
            labelled[group.leader] = sum(wins != 0 for wins in group.wins.values())
    return MergePlan(leaders, tokens, completion_tokens, scored_tokens, sequences, labelled)


def _numbered(keys: Iterator[bytes]) -> np.ndarray:
    """(R,) numbers that are equal where the keys are."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


class _Example(NamedTuple):
    """Completions and edges of an example."""

    digests: list[bytes]  # of the completions' tokens and masks
    lengths: list[int]  # of the completions
    scored: list[int]  # tokens of the completions that are scored
    chosen: list[int]
    rejected: list[int]


def _examples(table: datasets.Dataset, indices: np.ndarray) -> Iterator[_Example]:
    selected = table.select(indices)
    columns = (_read(selected, name) for name in ("completions", "masks", "winners", "losers"))
    for completions, masks, chosen, rejected in zip(*columns, strict=True):
        flat = completions.flatten()
        digests, lengths = _digests(flat), flat.value_lengths().to_pylist()
        ends = pairwise(accumulate(completions.value_lengths().to_pylist(), initial=0))
        edges = zip(chosen.to_pylist(), rejected.to_pylist(), strict=True)
        for (start, end), mask, (its_chosen, its_rejected) in zip(ends, masks, edges, strict=True):
            whose, scored = digests[start:end], lengths[start:end]
            if its_masks := mask.as_py():
                whose = [
                    x if all(each) else x + bytes(each) for x, each in zip(whose, its_masks, strict=True)
                ]
                scored = [sum(each) for each in its_masks]
            yield _Example(whose, lengths[start:end], scored, its_chosen, its_rejected)


def _read(table: datasets.Dataset, name: str) -> Iterator[Any]:
    """A column in pieces, as Arrow arrays."""
    for piece in table.select_columns([name]).with_format("arrow").iter(batch_size=10_000):
        yield piece[name].combine_chunks()  # type: ignore[union-attr]


def _digests(lists: pa.ListArray) -> list[bytes]:
    """A hash of the int32 numbers of every list."""
    numbers = np.ascontiguousarray(lists.flatten().to_numpy(zero_copy_only=False), np.int32)
    ends = accumulate(lists.value_lengths().to_pylist(), initial=0)
    return [xxhash.xxh3_128_digest(numbers[start:end].data) for start, end in pairwise(ends)]
