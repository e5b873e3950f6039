"""A reference that moves: TR-DPO's updates towards the policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def move_reference(
    policy: nn.Module, reference: nn.Module, alpha: float, seed: int, device: torch.device
) -> None:
    """Set every weight of the reference to alpha * policy + (1 - alpha) * reference.

    This is TR-DPO's soft update, with alpha 1 its hard one. One pair of weights is gathered at a time.
    In bfloat16 policy and reference differ by about one unit in the last place, and rounding to nearest would
    move a weight all the way or not at all. Such weights are rounded up or down at random, in proportion; the
    draws depend on `seed` alone.
    Source: Gorbatovski et al. 2024 (arXiv 2404.09656).
    """
    import deepspeed

    random = torch.Generator(device).manual_seed(seed)
    for ours, theirs in zip(policy.parameters(), reference.parameters(), strict=True):
        with deepspeed.zero.GatheredParameters([ours, theirs], modifier_rank=0):
            mixed = torch.lerp(theirs.float(), ours.float(), alpha)
            theirs.data.copy_(rounded(mixed, random) if theirs.dtype == torch.bfloat16 else mixed)


def rounded(x: Tensor, random: torch.Generator) -> Tensor:
    """x (float32) rounded at random to one of its two neighbours in bfloat16; the mean over draws is x."""
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(1 << 16, x.shape, generator=random, dtype=torch.int32, device=x.device)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
