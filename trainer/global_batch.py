"""A step of an objective whose losses look at every completion of the step, on all ranks.

    score all micro-batches, without gradients
      -> all ranks exchange the completions' log-probs, in the step's own order
      -> the losses, and by autograd on these few numbers their gradient in each log-prob
      -> train the micro-batches with these gradients as constants, without completions whose gradient is 0

By the chain rule the last pass has the gradient of the losses. The losses do not depend on how the step is
spread over ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from madpo.kernels.token_scores import TokenScores
from madpo.trainer.batches.cost import StepWork
from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.batches.steps import Step
from madpo.trainer.engine import Engine
from madpo.trainer.metrics import Meter, add_batch, add_stats
from madpo.trainer.objectives.base import BatchState, Item, Outcome
from madpo.trainer.objectives.build import BoundObjective
from madpo.trainer.objectives.scores import Scored, SequenceScores
from madpo.trainer.scoring_module import Mode
from madpo.trainer.waiting import waited


class Losses(NamedTuple):
    """What follows from the losses of a step."""

    dloss_dlogps: Tensor  # (S,) for all completions of the step, on the CPU
    memory: dict[str, list[float]]  # the objective's, for the next step's BatchState


def forward_backward(
    engine: Engine, step: Step, batches: Sequence[PackedBatch], meter: Meter, state: BatchState
) -> tuple[dict[str, list[float]], StepWork]:
    """Accumulate the gradients of a step whose `batches` are on the engine's device.

    Returns the objective's memory for the next step, and the work that was done.
    """
    if len(batches) == 1:
        return _in_one_pass(engine, step, batches[0], meter, state), step.work
    return _in_two_passes(engine, step, batches, meter, state)


def evaluate(
    engine: Engine, step: Step, batches: Sequence[PackedBatch], meter: Meter, state: BatchState
) -> None:
    """Fold the metrics of a step into the meter, without gradients."""
    _losses(engine.module.head.objective, step, batches, _scored(engine, batches, meter), meter, state)


def _in_one_pass(
    engine: Engine, step: Step, batch: PackedBatch, meter: Meter, state: BatchState
) -> dict[str, list[float]]:
    """Forward and backward where each rank has one micro-batch.

    The backbone runs once, the head twice: first for the log-probs, which all ranks exchange; then for
    the loss, with the exchanged gradients as constants.
    """
    memory = dict[str, list[float]]()

    def exchange(batch: PackedBatch, tokens: TokenScores) -> Tensor:
        losses = _losses(engine.module.head.objective, step, [batch], [tokens], meter, state)
        memory.update(losses.memory)
        return own_gradients(losses.dloss_dlogps, batch)

    with engine.own_module_order("scoring and training"):
        for one in engine.accumulate([batch]):
            out = engine(one, Mode.EXCHANGE, exchange)
            add_stats(meter, one, engine.module.stats)
            engine.backward(out.loss)
    return memory


def _in_two_passes(
    engine: Engine, step: Step, batches: Sequence[PackedBatch], meter: Meter, state: BatchState
) -> tuple[dict[str, list[float]], StepWork]:
    """Forward and backward where a rank has several micro-batches.

    Each runs twice: a scoring pass without gradients, then a training pass without the completions whose
    gradient is 0.
    """
    module = engine.module
    losses = _losses(module.head.objective, step, batches, _scored(engine, batches, meter), meter, state)
    on_host = [(batch, own_gradients(losses.dloss_dlogps, batch)) for batch in step.batches]
    work = step.work
    # A loss over all packed tokens needs every completion, and a slice of a row holds no whole one.
    if not module.loss_of_tokens and module.sequence_group is None:
        on_host = [_without_zeros(batch, gradients) for batch, gradients in on_host]
        work += step.saved_by((losses.dloss_dlogps == 0).numpy())
    # All are on their way before the first backward: a copy inside the loop would wait for the device.
    on_device = [
        (batch.to(engine.device), gradients.to(engine.device, non_blocking=True))
        for batch, gradients in on_host
    ]
    for batch, gradients in engine.accumulate(on_device):
        engine.backward(engine(batch, Mode.FROM_GRADIENTS, gradients).loss)
    return losses.memory, work


def _without_zeros(
    batch: PackedBatch,
    gradients: Tensor,  # (S,)
) -> tuple[PackedBatch, Tensor]:
    """The batch without the completions whose gradient is 0, and the gradients of the others."""
    batch, selected = batch.without((gradients == 0).numpy())
    return batch, gradients[selected]


@torch.no_grad()
def _scored(engine: Engine, batches: Sequence[PackedBatch], meter: Meter) -> list[TokenScores]:
    """Score every batch without gradients: per-token log-probs of policy and reference."""
    out = []
    with engine.own_module_order("scoring"):
        for batch in batches:
            out.append(engine(batch, Mode.SCORE).tokens)
            add_stats(meter, batch, engine.module.stats)
    return out


@torch.no_grad()
def _losses(
    objective: BoundObjective,
    step: Step,
    batches: Sequence[PackedBatch],
    tokens: Sequence[TokenScores],  # one for each batch
    meter: Meter,
    state: BatchState,
) -> Losses:
    """Exchange the scores, form the losses of the whole step, and fold this rank's part into the meter."""
    scored = [batch.scored(scores) for batch, scores in zip(batches, tokens, strict=True)]
    outcomes, gradients = share_losses(step, batches, scored, objective, state)
    for batch, scores, outcome in zip(batches, scored, outcomes, strict=True):
        add_batch(meter, batch, scores, outcome, objective)
    return Losses(gradients, outcomes[0].memory)


def share_losses(
    step: Step,
    batches: Sequence[PackedBatch],
    scored: Sequence[Scored],  # one for each batch
    objective: BoundObjective,
    state: BatchState,
) -> tuple[list[Outcome], Tensor]:
    """Form the losses of the whole step, on every rank.

    Returns the outcome of each of this rank's batches, with the memory for the next step; and (S,) the
    gradient of the sum of all losses in the log-prob of every completion of the step. All ranks call
    this once a step.
    """
    sequences, chosen, rejected, margins, weights = _exchange(step, batches, scored, objective.item)
    leaf = sequences.logps.requires_grad_()
    with torch.enable_grad():
        edges = sequences.edges(chosen, rejected, margins)
        scores = edges if objective.item is Item.EDGE else sequences
        outcome = objective.entry.function(scores, objective.params, state).weighted(weights)
        (gradients,) = torch.autograd.grad(outcome.losses.sum(), leaf)
    return [_part(outcome, batch, objective.item) for batch in batches], gradients


def _part(outcome: Outcome, batch: PackedBatch, item: Item) -> Outcome:
    """Select one batch's items from the outcome of the step."""
    positions = batch.edge_positions if item is Item.EDGE else batch.sequence_positions

    def select(values: Tensor) -> Tensor:
        return values.to(positions.device)[positions]

    stats = {name: select(values) for name, values in outcome.stats.items()}
    return Outcome(select(outcome.losses.detach()), stats, outcome.memory)


def own_gradients(
    gradients: Tensor,  # for all completions of the step
    batch: PackedBatch,
) -> Tensor:
    """(S,) the gradients of one batch's completions; 0 for a dummy batch, which has no positions."""
    own = gradients.new_zeros(len(batch.lengths), device=batch.labels.device)
    own[: len(batch.sequence_positions)] = gradients.to(own.device)[batch.sequence_positions]
    return own


class _Exchanged(NamedTuple):
    """What every rank knows of the whole step, on the CPU."""

    sequences: SequenceScores  # S
    chosen: Tensor  # (E,)
    rejected: Tensor  # (E,)
    margins: Tensor  # (E,)
    weights: Tensor  # (items,) the data's factors on the losses


SEQUENCE_COLUMNS, EDGE_COLUMNS = 5, 4


def _exchange(step: Step, batches: Sequence[PackedBatch], scored: Sequence[Scored], item: Item) -> _Exchanged:
    """The scores of all completions, and all edges, of all ranks.

    Each rank fills its own positions in a table of zeros, and the sum over ranks is the whole table. Ranks
    that share a row fill the same positions, so the sum is divided by their number.
    """
    device = batches[0].labels.device
    end = SEQUENCE_COLUMNS * step.num_sequences
    flat = torch.zeros(end + EDGE_COLUMNS * step.num_edges, dtype=torch.float64, device=device)
    table = flat[:end].view(SEQUENCE_COLUMNS, step.num_sequences)
    edges = flat[end:].view(EDGE_COLUMNS, step.num_edges)
    has_reference = scored[0].ref_token_logps is not None
    for batch, scores in zip(batches, scored, strict=True):
        positions = batch.sequence_positions
        ref_logps = scores.ref_logps if has_reference else torch.zeros_like(scores.logps)
        counts = scores.lengths.double(), scores.labels.double()
        columns = torch.stack(
            (scores.logps, ref_logps, *counts, _or_ones(scores.completion_weights, counts[0]))
        )
        table[:, positions] = columns[:, : len(positions)]
        won, lost = positions[scores.chosen].double(), positions[scores.rejected].double()
        edge_weights = _or_ones(scores.edge_weights, scores.margins)
        edges[:, batch.edge_positions] = torch.stack((won, lost, scores.margins, edge_weights))
    with waited():
        dist.all_reduce(flat)
    flat = flat.cpu() / step.copies
    logps, ref_logps, lengths, labels, weights = flat[:end].view(SEQUENCE_COLUMNS, -1).unbind()
    chosen, rejected, margins, edge_weights = flat[end:].view(EDGE_COLUMNS, step.num_edges).unbind()
    sequences = SequenceScores(
        logps.clone(), ref_logps if has_reference else None, lengths.long(), labels.long()
    )
    return _Exchanged(
        sequences, chosen.long(), rejected.long(), margins, edge_weights if item is Item.EDGE else weights
    )


def _or_ones(weights: Tensor | None, like: Tensor) -> Tensor:
    """The weights (k,), or as many ones."""
    return torch.ones_like(like) if weights is None else weights
