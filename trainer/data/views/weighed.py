"""Views by weight: skip what has weight 0, drop what is light, or draw groups by weight.

A weight is a factor on the loss of an edge, or of a completion under objectives of completions and tokens.
It comes from the data set, from the margin where the objective declares such a weight, or from both, which
are multiplied. So it is known before anything is computed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from madpo.trainer.data.groups import TokenDataset
from madpo.trainer.data.views.ragged import sums
from madpo.trainer.data.views.trimmed import SelectedDataset, TrimmedDataset
from madpo.trainer.errors import UserError
from madpo.trainer.objectives.base import Item
from madpo.trainer.objectives.build import BoundObjective


def weights_of(groups: TokenDataset, objective: BoundObjective) -> np.ndarray | None:
    """(K,) the weights of all edges, or of all completions if the objective counts these or their tokens.

    None if nothing gives a weight.
    """
    if objective.item is not Item.EDGE:
        return groups.completion_weights
    own = groups.edge_weights
    if objective.weight is None:
        return own
    by_margin = objective.weight(torch.from_numpy(groups.margins.astype(np.float64))).numpy()
    return by_margin if own is None else by_margin * own


def skip_weightless(groups: TokenDataset, objective: BoundObjective) -> TokenDataset:
    """Skip the edges whose weight is exactly 0, or the groups whose completions have no other.

    They still count in the mean, so losses and gradients stay those of all. An objective of the global batch
    needs the log-probs of all, so nothing is skipped for it.
    """
    weights = weights_of(groups, objective)
    if weights is None or weights.all() or objective.needs_batch:
        return groups
    everything = np.arange(len(groups))
    if objective.item is Item.EDGE:
        return TrimmedDataset(groups, weights != 0, everything, groups.counts.edges)
    return SelectedDataset(groups, everything, sums(weights, groups.counts.sequences) > 0)


def drop_light(
    groups: TokenDataset, objective: BoundObjective, least: float
) -> tuple[TokenDataset, dict[str, Any]]:
    """Drop the edges lighter than `least`, or the groups that have lighter completions only, also from the
    mean; with numbers for the report.

    Raises UserError if nothing gives weights, or nothing is left.
    """
    weights = _needed(groups, objective, "min_weight")
    keep, unit = weights >= least, _unit(objective)
    if not keep.any():
        raise UserError(
            f"data.min_weight: {least:g} is above the weight of every {unit} of {groups.name}, of which the "
            f"largest is {weights.max():g}; lower it"
        )
    report = {
        f"{unit}s_below_min_weight": int((~keep).sum()),
        "share_of_weight_below": float(weights[~keep].sum() / weights.sum()),
    }
    if keep.all():
        return groups, report
    kept = sums(keep.astype(np.int64), _counts(groups, objective))
    selected = np.flatnonzero(kept)
    if objective.item is Item.EDGE:
        remaining = TrimmedDataset(groups, keep, selected, counted=kept[selected])
    else:
        remaining = SelectedDataset(groups, selected, np.ones(len(selected), dtype=bool))
    return remaining, report | {"groups": len(remaining), "tokens": int(remaining.counts.lengths.sum())}


def draw_by_weight(groups: TokenDataset, objective: BoundObjective) -> tuple[TokenDataset, np.ndarray]:
    """A view for drawing groups by weight, and (G,) the weights W to draw by, each the sum over its items.

    With N items of weights w and losses l, the mean that training descends is L = sum_i w_i l_i / N. Draw
    group g with probability W_g / sum W, and count it as one item of loss (sum W / N) / W_g times the sum of
    w_i l_i over its items: its expectation is L, whatever the sizes of groups. A single pair has the factor
    sum W / N, the mean weight. Raises UserError if nothing gives weights, or all are 0.
    """
    weights = _needed(groups, objective, "sampling")
    counts, items = _counts(groups, objective), groups.counts.items(objective.item)
    group_weights = sums(weights, counts) * (items / counts)
    if not group_weights.any():
        raise UserError(f"data.sampling: all of {groups.name} has weight 0; nothing can be drawn")
    mean = group_weights.sum() / items.sum()
    factors = mean / np.where(group_weights > 0, group_weights, 1.0)
    everything = np.arange(len(groups))
    if objective.item is Item.EDGE:
        counted = np.ones_like(groups.counts.edges)
        return TrimmedDataset(groups, weights != 0, everything, counted, factors), group_weights
    return SelectedDataset(groups, everything, group_weights > 0, factors), group_weights


def _counts(groups: TokenDataset, objective: BoundObjective) -> np.ndarray:
    """(G,) the weights that each group has."""
    return groups.counts.edges if objective.item is Item.EDGE else groups.counts.sequences


def _unit(objective: BoundObjective) -> str:
    return "pair" if objective.item is Item.EDGE else "completion"


def _needed(groups: TokenDataset, objective: BoundObjective, key: str) -> np.ndarray:
    weights = weights_of(groups, objective)
    if weights is None:
        raise UserError(
            f"data.{key}: no row of {groups.name} has a weight, and {objective.loss_type} has none that "
            "follows from the margin; give a column weight, or leave the key out"
        )
    return weights
