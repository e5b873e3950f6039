"""Scores of few completions, for arithmetic by hand."""

from __future__ import annotations

import torch

from madpo.trainer.objectives import EdgeScores
from madpo.trainer.objectives.scores import Scored


def scored(
    token_logps: torch.Tensor, ref: torch.Tensor | None, lengths: list[int], margin: float = 0.0
) -> Scored:
    edges = torch.arange(0, len(lengths), 2)
    return Scored(
        token_logps,
        ref,
        torch.tensor(lengths),
        edges,
        edges + 1,
        torch.full((len(edges),), margin, dtype=torch.float64),
        torch.tensor([1, -1] * len(lengths))[: len(lengths)],
    )


def edge(chosen: float = -12.0, dtype=torch.float64) -> EdgeScores:
    """n_w = 10, n_l = 12; a = 0.5, b = -0.8, D = 1.3 unless `chosen` says otherwise; margin 2."""
    won, lost, ref_won, ref_lost, margin = torch.tensor(
        [[chosen], [-15.0], [-12.5], [-14.2], [2.0]], dtype=dtype
    )
    return EdgeScores(won, lost, ref_won, ref_lost, torch.tensor([10]), torch.tensor([12]), margin)
