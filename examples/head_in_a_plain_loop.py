"""The loss head in a training loop of your own, on several ranks: DDP, or FSDP2 with every weight sharded.

    torchrun --nproc-per-node 2 examples/head_in_a_plain_loop.py           # FSDP2
    torchrun --nproc-per-node 2 examples/head_in_a_plain_loop.py --ddp     # DDP

The head needs `lm_head.weight` whole. So the loss is formed inside the forward of the module that is
wrapped: there FSDP2 has gathered the weights that belong to it, and its backward hooks share the gradient
out again. DDP and ZeRO-3 want the same form, since they too watch a module's forward.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from head_in_trainer import BETA, VOCABULARY, collate, plain_loss, random_pairs, scored_rows
from tiny_model import random_llama
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from madpo.kernels.edge_loss import EdgeLoss
from madpo.kernels.layout import GroupLayout
from madpo.kernels.preference_loss import Reference, preference_loss

STEPS, PAIRS = 4, 4


class PolicyWithLoss(nn.Module):
    """A policy, its frozen reference, and the loss of a batch as the result of their forward."""

    def __init__(self, policy: PreTrainedModel, reference: PreTrainedModel) -> None:
        super().__init__()
        self.policy, self.reference = policy, reference.requires_grad_(False).eval()

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        hidden, targets = scored_rows(self.policy, inputs)
        with torch.no_grad():
            ref_hidden, _ = scored_rows(self.reference, inputs)
        # Both weights are whole here: they belong to no layer, hence to the module whose forward this is.
        return preference_loss(
            hidden,
            self.policy.lm_head.weight,
            targets,
            GroupLayout.pairs(inputs["lengths"], hidden.device),
            EdgeLoss(beta=BETA),
            Reference(ref_hidden, self.reference.lm_head.weight),
            scale=2 / len(inputs["lengths"]),  # this rank's mean; the wrapper averages over ranks
        ).loss


def sharded(module: PolicyWithLoss) -> nn.Module:
    """Share the weights out: each layer is gathered for itself, all the rest with the module as a whole."""
    for model in (module.policy, module.reference):
        for layer in model.model.layers:
            fully_shard(layer)
    fully_shard(module)
    return module


def whole(parameter: Tensor) -> Tensor:
    """A parameter or gradient in one piece, on every rank."""
    full_tensor = getattr(parameter, "full_tensor", None)
    return full_tensor() if full_tensor else parameter


def main(arguments: Sequence[str] = ()) -> dict[str, float]:
    """Train a few steps on random pairs; returns how far loss and weights are from plain torch's."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    start = random_llama(VOCABULARY)
    plain, reference = copy.deepcopy(start), copy.deepcopy(start)
    policy = PolicyWithLoss(start, copy.deepcopy(reference))
    module = DistributedDataParallel(policy) if "--ddp" in arguments else sharded(policy)
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.3) for x in (policy.policy, plain)]

    furthest = 0.0
    for step in range(STEPS):
        pairs = random_pairs(PAIRS * ranks, seed=step)
        loss = module(collate(pairs[rank * PAIRS : (rank + 1) * PAIRS]))
        loss.backward()
        expected = plain_loss(plain, reference, collate(pairs))  # all ranks' pairs in one process
        expected.backward()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        mean /= ranks
        if rank == 0:
            print(f"step {step + 1}: loss {mean:.6f}, plain torch {expected:.6f}", flush=True)
        furthest = max(furthest, abs(mean.item() - expected.item()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    ours = {name: whole(weight) for name, weight in policy.policy.named_parameters()}
    apart = max((ours[name] - weight).abs().max().item() for name, weight in plain.named_parameters())
    if rank == 0:
        print(f"largest difference of a weight after {STEPS} steps: {apart:.1e}")
    return {"loss": furthest, "weight": apart}


if __name__ == "__main__":
    main(sys.argv[1:])
    dist.destroy_process_group()
