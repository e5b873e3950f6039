"""Whether policy and reference can go through the layers in one forward, tried on a few tokens."""

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
from madpo.trainer.model.interleaved import Traversal, find_traversal
from madpo.trainer.model.policy import PolicyWithReference
from madpo.trainer.model.startup.checks import tolerance_of
from madpo.trainer.scoring_module import ReferenceScorer


@torch.no_grad()
def share_traversal(module: PolicyWithReference, device: torch.device) -> None:
    """Have policy and reference go through the layers together where they are one model and no bit depends
    on it; elsewhere a note says why not. All ranks must call it.

    Tried with a reference that starts from the embeddings of other tokens: what one takes from the other, and
    what a model does between its layers, shows although an adapter that is fresh changes nothing yet.
    """
    policy, reference = module.policy, module.reference_scorer
    if reference is None or reference.model is not policy:
        return
    found = find_traversal(backbone(policy), reference.switch)
    if module.balance is not None:
        found = "the balance of the experts is the policy's alone (model.router_aux_loss_coef)"
    if isinstance(found, Traversal):
        differs = torch.tensor(not _is_exact(found, reference, device), dtype=torch.int32, device=device)
        if torch_dist.is_initialized():
            torch_dist.all_reduce(differs, torch_dist.ReduceOp.MAX)
        if differs:
            found = f"{type(policy).__name__} does more than run its layers one after another"
    if isinstance(found, Traversal):
        module.traversal = found
    else:
        module.notes.append(f"policy and reference take a forward pass each: {found}")


def _is_exact(traversal: Traversal, reference: ReferenceScorer, device: torch.device) -> bool:
    model = reference.model
    ids = np.random.default_rng(2).integers(0, min(model.config.vocab_size, 1000), 96)
    prompt, *completions = (part.tolist() for part in np.split(ids, 3))
    batch = pack([TokenGroup(prompt, completions, [])]).to(device)
    run = partial(last_hidden, model, batch, SegmentTable(batch.segments))

    def others(hidden: Tensor) -> Tensor:
        return hidden.roll(1, dims=1)

    with traversal.starting_from(others), reference.state():
        apart = run()
    apart = torch.stack((run(), apart)).float()  # (2, N, H)
    with traversal.along(others) as companion:
        together = run()
    if companion.hidden is None or companion.hidden.shape[1:] != together.shape:
        return False
    together = torch.stack((together, companion.last_hidden)).float()
    return float((together - apart).norm() / apart.norm()) < tolerance_of(model) / 100
