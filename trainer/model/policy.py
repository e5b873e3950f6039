"""Policy and frozen reference as one module for DeepSpeed: one engine, one forward, one loss."""

from __future__ import annotations

from functools import partial
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from madpo.trainer.batches.packing import PackedBatch
from madpo.trainer.data.lengths import PositionBorder
from madpo.trainer.errors import UserError
from madpo.trainer.head import Impl, OutputLayers, PreferenceHead
from madpo.trainer.model.attention.prefix_sharing import SegmentTable, shares_rows
from madpo.trainer.model.backbone import output_head, run_backbone, scored_hidden
from madpo.trainer.model.expert_balance import ExpertBalance
from madpo.trainer.model.interleaved import InterleavedForward
from madpo.trainer.model.positions import position_borders
from madpo.trainer.objectives.build import BoundObjective
from madpo.trainer.scoring_module import Gradients, Mode, ReferenceScorer
from madpo.trainer.sequence_parallel import SequenceGroup
from madpo.trainer.sliced_head import SlicedHead


class PolicyWithReference(nn.Module):
    """A policy, the reference it is compared with, and the loss head over the scored tokens of both.

    The reference has no gradient and no optimiser state; a reference model of its own stays in evaluation
    mode. Without a reference, batches carry its cached log-probs, or the objective needs none.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        reference: ReferenceScorer | None,
        objective: BoundObjective,
        budget_bytes: int,
        impl: Impl = "auto",
        balance: ExpertBalance | None = None,
        sequence_group: SequenceGroup | None = None,
    ) -> None:
        super().__init__()
        self.policy, self.reference_scorer = policy, reference
        self.balance, self.sequence_group = balance, sequence_group
        self.interleaved: InterleavedForward | None = None  # set by `interleave_reference`
        self.repeats_layers = False
        self.stats: dict[str, Tensor] = {}  # () each: means over the last batch's tokens
        self.notes: list[str] = []  # what a user should know of the models
        self.reference = None if reference is None or reference.model is policy else reference.model
        if self.reference is not None:
            self.reference.requires_grad_(False).eval()
        head, ref_head = output_head(policy), None
        if reference is not None:
            with reference.state():
                ref_head = output_head(reference.model)
        if ref_head is not None and ref_head.transform != head.transform:
            raise UserError(
                f"policy and reference treat their logits differently: {head.transform}, {ref_head.transform}"
            )
        layers = head, ref_head, objective, budget_bytes, impl
        self.head: OutputLayers = PreferenceHead(*layers)
        if sequence_group is not None:
            self.head = SlicedHead(*layers, sequence_group=sequence_group)

    @property
    def shares_rows(self) -> bool:
        """Whether sequences may share a packed row, and completions their prompt."""
        return shares_rows(self.policy)

    @property
    def borders(self) -> tuple[PositionBorder, ...]:
        """Lengths beyond which the model encodes positions otherwise."""
        return position_borders(self.policy, self.reference)

    @property
    def loss_of_tokens(self) -> bool:
        """Whether the balance of experts, a mean over all packed tokens, is in the loss."""
        return self.balance is not None

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def forward(
        self, batch: PackedBatch, mode: Mode = Mode.LOSS, gradients: Gradients = None
    ) -> tuple[Tensor | None, ...]:
        """The loss () and the fields of `TokenScores`, as `mode` asks; FROM_GRADIENTS runs no reference.

        The load-balancing loss of experts is part of the loss, and in `stats`.
        """
        assert (batch.own_tokens is None) == (self.sequence_group is None), (
            "rows in slices are for their group"
        )
        table = SegmentTable(batch.segments, self.sequence_group)
        options = {} if self.balance is None else {"output_router_logits": True}
        run_policy = partial(run_backbone, self.policy, batch, table, **options)
        reference = None if mode is Mode.FROM_GRADIENTS else self.reference_scorer
        ref_hidden = None
        assert reference is None or batch.ref_token_logps is None, "a reference, and its log-probs, too"
        if reference is not None and self.interleaved is not None:
            with self.interleaved.reference_beside() as stream:
                output = run_policy()
            ref_hidden = stream.last_hidden.index_select(0, batch.scored_positions)
        else:
            if reference is not None:  # first, as in `ReferenceStream.through_layer`
                with torch.no_grad(), reference.state():
                    ref_hidden = scored_hidden(reference.model, batch, table)
            output = run_policy()
        hidden = output.last_hidden_state[0].index_select(0, batch.scored_positions)
        loss, *tokens = self.head(hidden, ref_hidden, batch, mode, gradients)
        if self.balance is not None:
            aux_loss = self.balance(output.router_logits)
            self.stats = {"aux_loss": aux_loss.detach()}
            share = batch.token_scale * len(batch.input_ids)
            loss = loss + self.balance.coef * share * aux_loss
        return loss, *tokens
