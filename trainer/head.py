"""The loss head: the only caller of kernels/. Hidden states in, loss and log-probs out."""

from __future__ import annotations

from torch import Tensor, nn

from madpo.kernels.preference_loss_ref import Wave, plan_waves, preference_loss_ref
from madpo.trainer.data.packing import PackedBatch
from madpo.trainer.objectives.base import Objective, Params, Scored


class PreferenceHead(nn.Module):
    """Holds the output embeddings of policy and reference, shared with the models that own them.

    A module of its own so that ZeRO-3 gathers the two weights around its forward and backward only.
    """

    def __init__(
        self,
        weight: nn.Parameter,  # (V, H)
        ref_weight: nn.Parameter | None,  # (V, H)
        objective: Objective,
        params: Params,
        max_rows: int,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.ref_weight = ref_weight
        self.objective = objective
        self.params = params
        self.max_rows = max_rows
        self.softcap = softcap

    def forward(
        self,
        hidden: Tensor,  # (M, H) policy, scored rows
        ref_hidden: Tensor | None,  # (M, H)
        batch: PackedBatch,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss (), token_logps (M,), ref_token_logps (M,) or None)."""

        def wave_loss(logps: Tensor, ref_logps: Tensor | None, wave: Wave) -> Tensor:
            scored = scored_wave(batch, logps, ref_logps, wave)
            return self.objective.function(scored, self.params).losses.sum()

        return preference_loss_ref(
            hidden,
            self.weight,
            batch.targets,
            plan_waves(batch.lengths, batch.group_sequences, batch.group_edges, self.max_rows),
            wave_loss,
            scale=batch.scale,
            max_rows=self.max_rows,
            softcap=self.softcap,
            ref_hidden=ref_hidden,
            ref_weight=self.ref_weight,
        )


WHOLE = Wave(slice(0, None), slice(0, None), slice(0, None))


def scored_wave(
    batch: PackedBatch,
    token_logps: Tensor,  # (m,) of the wave's rows
    ref_token_logps: Tensor | None,  # (m,)
    wave: Wave = WHOLE,
) -> Scored:
    """What the objective sees of one wave, or of the whole batch: sequences count from the first."""
    first = wave.sequences.start
    return Scored(
        token_logps,
        ref_token_logps,
        batch.seq_lengths[wave.sequences],
        batch.winners[wave.edges] - first,
        batch.losers[wave.edges] - first,
        batch.margins[wave.edges],
    )
