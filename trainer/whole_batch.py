"""Losses that look at every completion of a step, whichever rank and micro-batch it is in.

A first pass, without gradients, gives the log-prob of every completion. They meet on all ranks in the
step's own order, so that the losses do not depend on how the step was spread; autograd on these few
numbers gives each completion's slope. A second pass with the slopes as constants has the gradient of the
losses, by the chain rule; completions whose slope is 0 have no part in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from madpo.trainer.data.loader import Step
from madpo.trainer.data.packing import PackedBatch
from madpo.trainer.objectives.base import (
    BatchState,
    Item,
    Objective,
    Outcome,
    Params,
    Scored,
    SequenceScores,
)


def share_losses(
    step: Step,
    batches: Sequence[PackedBatch],
    scored: Sequence[Scored],  # of each batch
    objective: Objective,
    params: Params,
    state: BatchState,
) -> tuple[list[Outcome], Tensor]:
    """For each of this rank's batches its part of the losses, and the slopes of all completions of the step.

    Every rank calls this once a step. The outcomes carry the memory for the next step.
    """
    sequences, winners, losers, margins = _meet(step, batches, scored)
    leaf = sequences.logps.requires_grad_()
    with torch.enable_grad():
        edges = sequences.edges(winners, losers, margins)
        outcome = objective.function(edges if objective.item is Item.EDGE else sequences, params, state)
        (slopes,) = torch.autograd.grad(outcome.losses.sum(), leaf)
    return [_part(outcome, batch, objective.item) for batch in batches], slopes


def _part(outcome: Outcome, batch: PackedBatch, item: Item) -> Outcome:
    """What the outcome of the step says of one batch."""
    places = batch.edge_places if item is Item.EDGE else batch.sequence_places
    values = {"": outcome.losses.detach(), **outcome.stats}
    part = {name: of.to(places.device)[places] for name, of in values.items()}
    return Outcome(part.pop(""), part, outcome.memory)


def own_slopes(
    slopes: Tensor,  # of all completions of the step
    batch: PackedBatch,
) -> Tensor:
    """(S,) of one batch's completions; 0 for a filler's, which has no place in the step."""
    own = slopes.new_zeros(len(batch.lengths), device=batch.labels.device)
    own[: len(batch.sequence_places)] = slopes.to(own.device)[batch.sequence_places]
    return own


def _meet(
    step: Step, batches: Sequence[PackedBatch], scored: Sequence[Scored]
) -> tuple[SequenceScores, Tensor, Tensor, Tensor]:
    """The scores of all completions (S,) and winners, losers, margins of all edges (E,), on the CPU.

    Each rank fills the places of its own in a table of zeros, and the sum over ranks is the whole, as often
    as there are ranks to a row.
    """
    device = batches[0].labels.device
    flat = torch.zeros(4 * step.num_sequences + 3 * step.num_edges, dtype=torch.float64, device=device)
    table = flat[: 4 * step.num_sequences].view(4, step.num_sequences)
    edges = flat[4 * step.num_sequences :].view(3, step.num_edges)
    has_reference = scored[0].ref_token_logps is not None
    for batch, scores in zip(batches, scored, strict=True):
        places = batch.sequence_places
        ref_logps = scores.ref_logps if has_reference else torch.zeros_like(scores.logps)
        columns = torch.stack((scores.logps, ref_logps, scores.lengths.double(), scores.labels.double()))
        table[:, places] = columns[:, : len(places)]
        won, lost = places[scores.winners].double(), places[scores.losers].double()
        edges[:, batch.edge_places] = torch.stack((won, lost, scores.margins))
    dist.all_reduce(flat)
    flat = flat.cpu() / step.copies
    logps, ref_logps, lengths, labels = flat[: 4 * step.num_sequences].view(4, -1).unbind()
    winners, losers, margins = flat[4 * step.num_sequences :].view(3, step.num_edges).unbind()
    sequences = SequenceScores(
        logps.clone(), ref_logps if has_reference else None, lengths.long(), labels.long()
    )
    return sequences, winners.long(), losers.long(), margins
