"""The choice at start-up between one interleaved forward and two, by a trial on a few tokens."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from madpo.trainer.batches.packing import pack
from madpo.trainer.data.tokenise import TokenGroup
from madpo.trainer.model.attention.prefix_sharing import SegmentTable
from madpo.trainer.model.backbone import backbone, last_hidden
from madpo.trainer.model.interleaved import InterleavedForward, find_interleaving
from madpo.trainer.model.policy import PolicyWithReference
from madpo.trainer.model.startup.checks import tolerance_of
from madpo.trainer.model.startup.positions import within_positions
from madpo.trainer.scoring_module import ReferenceScorer


@torch.no_grad()
def interleave_reference(module: PolicyWithReference, device: torch.device) -> None:
    """Run policy and reference layer by layer in one forward, if they are one model and a trial agrees with
    two forwards; otherwise keep two and note why. All ranks must call it.

    The reference of the trial starts from the embeddings of other tokens. A fresh adapter changes nothing
    yet; without that difference, a reference that is mixed up with the policy would go unseen.
    """
    policy, reference = module.policy, module.reference_scorer
    if reference is None or reference.model is not policy:
        return
    interleaving = find_interleaving(backbone(policy), reference.switch)
    if module.balance is not None:
        interleaving = "the balance of the experts is the policy's alone (model.router_aux_loss_coef)"
    if isinstance(interleaving, InterleavedForward):
        is_exact = _is_exact(interleaving, reference, device)
        differs = torch.tensor(not is_exact, dtype=torch.int32, device=device)
        if torch_dist.is_initialized():
            torch_dist.all_reduce(differs, torch_dist.ReduceOp.MAX)
        if differs:
            interleaving = f"{type(policy).__name__} does more than run its layers one after another"
    if isinstance(interleaving, InterleavedForward):
        module.interleaved = interleaving
    else:
        module.notes.append(f"policy and reference take a forward pass each: {interleaving}")


def _is_exact(interleaved: InterleavedForward, reference: ReferenceScorer, device: torch.device) -> bool:
    """Whether the last hidden states of both are those of two forwards, but for rounding."""
    model = reference.model
    tokens = 3 * (within_positions(model, 64) // 2)
    ids = np.random.default_rng(2).integers(0, min(model.config.vocab_size, 1000), tokens)
    prompt, *completions = (part.tolist() for part in np.split(ids, 3))
    batch = pack([TokenGroup(prompt, completions, [])]).to(device)
    run = partial(last_hidden, model, batch, SegmentTable(batch.segments))

    def other_tokens(hidden: Tensor) -> Tensor:
        return hidden.roll(1, dims=1)

    with interleaved.starting_from(other_tokens), reference.state():
        ref_hidden = run()
    separate = torch.stack((run(), ref_hidden)).float()  # (2, N, H)
    with interleaved.reference_beside(other_tokens) as stream:
        hidden = run()
    if stream.hidden is None or stream.hidden.shape[1:] != hidden.shape:
        return False
    together = torch.stack((hidden, stream.last_hidden)).float()
    return float((together - separate).norm() / separate.norm()) < tolerance_of(model) / 100
