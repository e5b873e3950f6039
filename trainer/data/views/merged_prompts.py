"""Rows that share a prompt as one group: the prompt, and a completion that several rows have, scored once."""

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
from madpo.trainer.data.tokenise import TokenGroup, labels_of
from madpo.trainer.data.views.ragged import ranges
from madpo.trainer.objectives.base import Item
from madpo.trainer.objectives.build import BoundObjective


def merge_prompts(
    groups: TabledGroups, objective: BoundObjective, most_tokens: int
) -> TabledGroups | MergedDataset:
    """The groups with those of one prompt (equal token ids) joined; the same where there are none to join.

    No comparison and no label is lost: a comparison that two rows make is made twice. Under objectives of
    pairs a completion that several rows have is scored once; under those of single completions each is an
    item of its own, and only the prompt is shared. Supervised rows stay as they are. A joined group has at
    most `most_tokens`, and a row that exceeds it opens another group of the prompt. A row that a mixture
    repeats stays repeated: its second copy joins second copies only.
    """
    if objective.supervised:
        return groups
    once = objective.item is Item.EDGE
    plan = _plan(groups, most_tokens, once)
    alone = bool((plan.leaders == np.arange(len(groups))).all())
    return groups if alone else MergedDataset(groups, plan, once)


def repeated_prompts(groups: TokenDataset) -> dict[str, int]:
    """Rows whose prompt an earlier row has, and the tokens of these prompts; nothing where there is none."""
    # What a mixture repeats of a row is merged with copies of others only: a row counts once.
    keys = np.stack((groups.prompt_hashes, groups.rows), axis=1)
    firsts = np.unique(keys, axis=0, return_index=True)[1]
    again = np.zeros(len(groups), dtype=bool)
    again[firsts] = True
    again[firsts[np.unique(groups.prompt_hashes[firsts], return_index=True)[1]]] = False
    prompts = groups.counts.lengths - groups.counts.completion_tokens
    found = {"rows_of_known_prompts": int(again.sum()), "tokens_of_known_prompts": int(prompts[again].sum())}
    return found if again.any() else {}


class MergePlan(NamedTuple):
    """The groups that rows join, by the first row of each, and what each of G rows brings to its group."""

    leaders: np.ndarray  # (G,)
    tokens: np.ndarray  # (G,) packed
    completion_tokens: np.ndarray  # (G,)
    sequences: np.ndarray  # (G,)
    labelled: np.ndarray  # (G,)


class MergedDataset:
    """Groups of one prompt as one, at the place of the first; R rows become G groups. `once`: a completion
    that several rows have is kept once."""

    def __init__(self, groups: TabledGroups, plan: MergePlan, once: bool) -> None:
        content = xxhash.xxh3_64_hexdigest(np.ascontiguousarray(plan.leaders, np.int64).tobytes())
        self.name, self.fingerprint = groups.name, f"{groups.fingerprint}, merged {content}"
        self.reference: ReferenceLogps | None = None
        self._groups, self._once = groups, once
        self._members = np.argsort(plan.leaders, kind="stable")  # (R,) one group after another
        leads = plan.leaders[self._members] == self._members
        self._starts = np.append(np.flatnonzero(leads), len(leads))  # (G + 1,)
        edges = self._sums(groups.counts.edges)
        self.counts = GroupCounts(
            lengths=self._sums(plan.tokens),
            completion_tokens=self._sums(plan.completion_tokens),
            sequences=self._sums(plan.sequences),
            edges=edges,
            counted_edges=edges,
            labelled=self._sums(plan.labelled),
        )

    def _sums(self, of_rows: np.ndarray) -> np.ndarray:
        return np.add.reduceat(of_rows[self._members], self._starts[:-1])

    @property
    def report(self) -> dict[str, int]:
        """What changes in the report of the rows."""
        return {
            "groups": len(self),
            "tokens": int(self.counts.lengths.sum()),
            "rows_merged": len(self._groups) - len(self),
            "tokens_saved_by_merging": int(self._groups.counts.lengths.sum() - self.counts.lengths.sum()),
        }

    @property
    def rows(self) -> np.ndarray:
        """(G,) as in GroupDataset, of the first row of a group."""
        return self._groups.rows[self._members[self._starts[:-1]]]

    @property
    def prompt_hashes(self) -> np.ndarray:
        return self._groups.prompt_hashes[self._members[self._starts[:-1]]]

    @property
    def margins(self) -> np.ndarray:
        return self._groups.margins[ranges(self._groups.counts.edges, self._members)]

    def shapes(self, indices: np.ndarray) -> Shapes:
        """Which completions rows share shows in the tokens: groups of several rows are read."""
        firsts, counts = self._starts[indices], np.diff(self._starts)[indices]
        return in_two_parts(
            counts == 1,
            lambda places: self._groups.shapes(self._members[firsts[places]]),
            lambda places: shapes_of([self[int(index)] for index in indices[places]]),
        )

    def ease(self, order: str) -> np.ndarray | None:
        return ease_of(self.name, order, self.margins, self.counts.edges) if order != "shuffled" else None

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: int) -> TokenGroup:
        members = self._members[self._starts[index] : self._starts[index + 1]]
        return joined([self._groups[int(member)] for member in members], self._once)


def joined(parts: Sequence[TokenGroup], once: bool) -> TokenGroup:
    """Groups of one prompt as one. `once`: completions that an earlier part has are not repeated, and labels
    say what all edges together say."""
    if len(parts) == 1:
        return parts[0]
    completions: list[list[int]] = []
    edges: list[tuple[int, int, float | None]] = []
    places = Places(once)
    for part in parts:
        of_part = places.take([tuple(completion) for completion in part.completions])
        completions += [x for x, at in zip(part.completions, of_part, strict=True) if at >= len(completions)]
        edges += [(of_part[winner], of_part[loser], margin) for winner, loser, margin in part.edges]
    return TokenGroup(
        parts[0].prompt,
        completions,
        edges,
        labels_of(edges, len(completions)) if once else [label for part in parts for label in part.labels],
        boundary_cut=max(part.boundary_cut for part in parts),
        truncated=sum(part.truncated for part in parts),
        equal=sum(part.equal for part in parts),
    )


class Places:
    """Where the completions of parts stand in the group that they become."""

    def __init__(self, once: bool) -> None:
        self.known: dict[Hashable, int] = {}
        self._once, self._count = once, 0

    def take(self, completions: Sequence[Hashable]) -> list[int]:
        """The place of each: that of an equal one in an earlier part if it is kept once, else a new one."""
        out = []
        for completion in completions:
            place = self.known.get(completion, self._count)
            self._count += place == self._count
            out.append(place)
        if self._once:
            for completion, place in zip(completions, out, strict=True):
                self.known.setdefault(completion, place)
        return out


@dataclass
class _Group:
    """A group that rows of its prompt still join."""

    leader: int
    tokens: int  # packed
    places: Places
    wins: Counter[int] = field(default_factory=Counter)  # by place, comparisons won less lost


def _plan(groups: TabledGroups, most_tokens: int, once: bool) -> MergePlan:
    """Row after row joins the last group of its prompt, or opens another if that would grow too large."""
    prompts = _numbered(hashed for column in _read(groups.table, "prompt") for hashed in _hashes(column))
    shared = np.flatnonzero(np.bincount(prompts)[prompts] > 1)
    leaders = np.arange(len(groups))
    brought = [
        groups.counts.lengths,
        groups.counts.completion_tokens,
        groups.counts.sequences,
        groups.counts.labelled,
    ]
    tokens, completion_tokens, sequences, labelled = (x.astype(np.int64) for x in brought)
    copies: Counter[tuple[Any, ...]] = Counter()
    last: dict[tuple[int, int], _Group] = {}  # of a prompt, and of which copy
    made: list[_Group] = []
    facts = zip(shared.tolist(), groups.rows[shared].tolist(), _own(groups.table, shared), strict=True)
    for index, row, own in facts:
        identity = (int(prompts[index]), row, *own.hashes)
        prompt = int(prompts[index]), copies[identity]
        copies[identity] += 1
        group, repeated = last.get(prompt), list[int]()
        if group is not None:
            known = group.places.known
            repeated = [n for hashed, n in zip(own.hashes, own.lengths, strict=True) if hashed in known]
        brings = int(completion_tokens[index]) - sum(repeated)
        if group is None or group.tokens + brings > most_tokens:
            group = last[prompt] = _Group(index, int(tokens[index]), Places(once))
            made.append(group)
        else:
            leaders[index] = group.leader
            tokens[index] = completion_tokens[index] = brings
            sequences[index] -= len(repeated)
            group.tokens += brings
        places = group.places.take(own.hashes)
        group.wins.update(places[winner] for winner in own.chosen)
        group.wins.subtract(places[loser] for loser in own.rejected)
    if once:
        labelled[shared] = 0
        labelled[[x.leader for x in made]] = [sum(n != 0 for n in x.wins.values()) for x in made]
    return MergePlan(leaders, tokens, completion_tokens, sequences, labelled)


def _numbered(keys: Iterator[bytes]) -> np.ndarray:
    """(G,) numbers that are equal where the keys are."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(key, len(seen)) for key in keys], dtype=np.int64)


class _Own(NamedTuple):
    """Of a row."""

    hashes: list[bytes]  # of its completions
    lengths: list[int]
    chosen: list[int]
    rejected: list[int]


def _own(table: datasets.Dataset, indices: np.ndarray) -> Iterator[_Own]:
    selected = table.select(indices)
    columns = (_read(selected, name) for name in ("completions", "winners", "losers"))
    for completions, chosen, rejected in zip(*columns, strict=True):
        flat = completions.flatten()
        hashes, lengths = _hashes(flat), flat.value_lengths().to_pylist()
        ends = pairwise(accumulate(completions.value_lengths().to_pylist(), initial=0))
        for (a, b), won, lost in zip(ends, chosen.to_pylist(), rejected.to_pylist(), strict=True):
            yield _Own(hashes[a:b], lengths[a:b], won, lost)


def _read(table: datasets.Dataset, name: str) -> Iterator[Any]:
    """A column in pieces, as Arrow arrays."""
    for piece in table.select_columns([name]).with_format("arrow").iter(batch_size=10_000):
        yield piece[name].combine_chunks()  # type: ignore[union-attr]


def _hashes(lists: pa.ListArray) -> list[bytes]:
    """Of the int32 numbers of every list."""
    numbers = np.ascontiguousarray(lists.flatten().to_numpy(zero_copy_only=False), np.int32)
    ends = accumulate(lists.value_lengths().to_pylist(), initial=0)
    return [xxhash.xxh3_128_digest(numbers[a:b].data) for a, b in pairwise(ends)]
