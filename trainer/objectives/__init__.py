"""The losses, also for use outside the trainer:

objective = build("madpo", beta=0.1, c_max=4.0, lam=1.0, tau=7.0)
losses = objective(EdgeScores(chosen_logps=..., rejected_logps=..., ...))  # (E,)
"""

from __future__ import annotations

from madpo.trainer.objectives.base import BatchState
from madpo.trainer.objectives.build import BoundObjective, build
from madpo.trainer.objectives.scores import EdgeScores, Scored, SequenceScores

__all__ = ["BatchState", "BoundObjective", "EdgeScores", "Scored", "SequenceScores", "build"]
