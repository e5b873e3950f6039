"""Our loss head behind the interface of peers.py, and the bare GEMMs that every exact head needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from madpo.benchmarks.head.peers import Peer
from madpo.benchmarks.head.problems import Problem
from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import GroupLayout, GroupRange
from madpo.kernels.preference_loss import PreferenceLoss, Reference, preference_loss


@dataclass(frozen=True)
class Grouped:
    """A problem with its `GroupLayout`, which a collator would form."""

    problem: Problem
    groups: GroupLayout

    @property
    def hidden(self) -> Tensor:
        return self.problem.hidden

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """(M, H) and (V, H)"""
        return self.hidden.grad, self.problem.weight.grad


def group(problem: Problem) -> Grouped:
    groups = GroupLayout.pairs(problem.lengths, problem.hidden.device)
    _ = groups.ranges  # copied to the device now, not in the first timed step
    return Grouped(problem, groups)


def head(state: Grouped, by_autograd: bool = False, **options: Any) -> PreferenceLoss:
    """MADPO's loss by the kernels, or `by_autograd`, as for an objective that the kernels do not form."""
    problem = state.problem
    loss: Any = EdgeLoss(problem.beta, margins=problem.margins, margin_weight=problem.margin_weight)
    return preference_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        state.groups,
        partial(madpo_of_range, state) if by_autograd else loss,
        Reference(problem.ref_hidden, problem.ref_weight),
        scale=1.0 / len(problem.margins),
        **options,
    )


def madpo_of_range(
    state: Grouped, logps: Tensor, ref_logps: Tensor | None, group_range: GroupRange
) -> Tensor:
    """madpo's loss as a function of the log-probs of some groups, for autograd."""
    assert ref_logps is not None
    lengths = state.groups.ranges.rows.diff()[group_range.sequences]
    ratios = (logps - ref_logps).double()
    sums = torch.segment_reduce(ratios, "sum", lengths=lengths, initial=0.0, unsafe=True)
    chosen, rejected = sums.view(-1, 2).unbind(1)
    return (
        state.problem.weights[group_range.edges] * -F.logsigmoid(state.problem.beta * (chosen - rejected))
    ).sum()


def _ours(name: str, note: str, needs_narrow: bool = False, **options: Any) -> Peer:
    def run(state: Grouped) -> Tensor:
        return head(state, **options).loss

    @torch.no_grad()
    def logps(state: Grouped) -> Tensor:
        return head(state, **options).logps

    return Peer(name, None, run, note, prepare=group, needs_narrow=needs_narrow, logps=logps)


OURS = (
    _ours("madpo", "2 GiB of float32 logits at once"),
    _ours("madpo, narrow logits", "2 GiB of logits in bfloat16", True, logits_dtype=torch.bfloat16),
    _ours("madpo, 256 MiB", "blocks of the vocabulary, twice: 10 M H V", budget_bytes=2**28),
    _ours(
        "madpo, any objective",
        "gradients in log-probs by autograd instead of in the kernel",
        by_autograd=True,
    ),
)


def gemm_chain(problem: Problem) -> None:
    """The bare products, 2 M H V each: logits of both models, gradients of hidden states and weight."""
    with torch.no_grad():
        logits = problem.hidden @ problem.weight.t()
        torch.mm(problem.ref_hidden, problem.ref_weight.t(), out=torch.empty_like(logits))
        torch.mm(logits, problem.weight)
        if problem.weight.requires_grad:
            torch.mm(logits.t(), problem.hidden)


def useful_flops(problem: Problem) -> int:
    """FLOPs that every head needs: 8 M H V; 6 M H V with a frozen output weight."""
    rows, width = problem.hidden.shape
    return (8 if problem.weight.requires_grad else 6) * rows * width * len(problem.weight)
