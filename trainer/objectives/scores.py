"""What an objective is given: the scores of edges, of sequences, or of tokens.

An edge is one preference pair of a group: its chosen completion was preferred to its rejected one. A group
of two completions has one edge, a ranking of K up to K (K - 1) / 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class EdgeScores:
    """The scores of E edges, each with a chosen and a rejected completion. What is not needed may be None."""

    chosen_logps: Tensor  # (E,) log pi(chosen | prompt), summed over tokens
    rejected_logps: Tensor  # (E,)
    ref_chosen_logps: Tensor | None = None  # (E,) log pi_ref(chosen | prompt)
    ref_rejected_logps: Tensor | None = None  # (E,)
    chosen_lengths: Tensor | None = None  # (E,) completion tokens
    rejected_lengths: Tensor | None = None  # (E,)
    margins: Tensor | None = None  # (E,) score of the chosen minus score of the rejected

    @cached_property
    def chosen_logratios(self) -> Tensor:
        """(E,) a = log pi - log pi_ref, of the chosen completion."""
        assert self.ref_chosen_logps is not None, "this objective declared no need of a reference"
        return self.chosen_logps - self.ref_chosen_logps

    @cached_property
    def rejected_logratios(self) -> Tensor:
        """(E,) b = log pi - log pi_ref, of the rejected completion."""
        assert self.ref_rejected_logps is not None, "this objective declared no need of a reference"
        return self.rejected_logps - self.ref_rejected_logps

    @cached_property
    def deltas(self) -> Tensor:
        """(E,) D = a - b, DPO's implicit margin without beta."""
        return self.chosen_logratios - self.rejected_logratios

    @cached_property
    def chosen_means(self) -> Tensor:
        """(E,) u_w = log pi(chosen) per token."""
        return self.chosen_logps / self.counts[0]

    @cached_property
    def rejected_means(self) -> Tensor:
        """(E,) u_l = log pi(rejected) per token."""
        return self.rejected_logps / self.counts[1]

    @cached_property
    def counts(self) -> tuple[Tensor, Tensor]:
        """Lengths of chosen and rejected (E,) in the dtype of the scores; 1 for an empty completion."""
        assert self.chosen_lengths is not None and self.rejected_lengths is not None
        kind = self.chosen_logps.dtype
        return self.chosen_lengths.clamp(min=1).to(kind), self.rejected_lengths.clamp(min=1).to(kind)


@dataclass(frozen=True)
class SequenceScores:
    """The scores of S completions without their pairs. What is not needed may be None."""

    logps: Tensor  # (S,) log pi(completion | prompt), summed over tokens
    ref_logps: Tensor | None = None  # (S,) log pi_ref(completion | prompt)
    lengths: Tensor | None = None  # (S,) completion tokens
    labels: Tensor | None = None  # (S,) 1 desirable, -1 undesirable, 0 belongs to another prompt

    @cached_property
    def logratios(self) -> Tensor:
        """(S,) log pi(y|x) - log pi_ref(y|x)."""
        assert self.ref_logps is not None, "this objective declared no need of a reference"
        return self.logps - self.ref_logps

    def edges(self, chosen: Tensor, rejected: Tensor, margins: Tensor) -> EdgeScores:
        """The scores of edges; chosen and rejected (E,) index into the S sequences."""
        ref, lengths = self.ref_logps, self.lengths
        return EdgeScores(
            self.logps[chosen],
            self.logps[rejected],
            None if ref is None else ref[chosen],
            None if ref is None else ref[rejected],
            None if lengths is None else lengths[chosen],
            None if lengths is None else lengths[rejected],
            margins,
        )


@dataclass(frozen=True)
class Scored:
    """The scores of whole groups. S sequences (completions), E edges, M completion tokens."""

    token_logps: Tensor  # (M,) log pi(token | prefix), sequences one after another
    ref_token_logps: Tensor | None  # (M,) log pi_ref(token | prefix)
    lengths: Tensor  # (S,) completion tokens
    chosen: Tensor  # (E,) index into the S sequences
    rejected: Tensor  # (E,)
    margins: Tensor  # (E,) score of the chosen minus score of the rejected
    labels: Tensor  # (S,) 1 desirable, -1 undesirable, 0 neither
    log_collisions: Tensor | None = None  # (M,) log sum_v p_v^2 of the policy's distribution; a constant
    kl: Tensor | None = None  # (M,) KL(pi_ref || pi) of the distributions at a token
    edge_weights: Tensor | None = None  # (E,) the data's factors on the losses of edges
    completion_weights: Tensor | None = None  # (S,) on those of completions

    @cached_property
    def logps(self) -> Tensor:
        """(S,) log pi(completion | prompt), summed over tokens in float64."""
        return segment_sum(self.token_logps, self.lengths)

    @cached_property
    def ref_logps(self) -> Tensor:
        """(S,) log pi_ref(completion | prompt), summed over tokens in float64."""
        assert self.ref_token_logps is not None, "this objective declared no need of a reference"
        return segment_sum(self.ref_token_logps, self.lengths)

    @cached_property
    def logratios(self) -> Tensor:
        """(S,) log pi(y|x) - log pi_ref(y|x)."""
        return self.logps - self.ref_logps

    @cached_property
    def sequences(self) -> SequenceScores:
        """The scores of the completions."""
        ref_logps = None if self.ref_token_logps is None else self.ref_logps
        return SequenceScores(self.logps, ref_logps, self.lengths, self.labels)

    @cached_property
    def edges(self) -> EdgeScores:
        """The scores of the edges."""
        return self.sequences.edges(self.chosen, self.rejected, self.margins)


Scores = EdgeScores | SequenceScores | Scored


def segment_sum(values: Tensor, lengths: Tensor) -> Tensor:
    """Sum consecutive segments in a fixed order, in float64: values (M,), lengths (S,) -> (S,).

    float64 because the log-ratio of a long sequence is a small difference of large sums; the vectors here
    are short.
    """
    # unsafe=True skips a check of the lengths that would wait for the device.
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, initial=0.0, unsafe=True)
