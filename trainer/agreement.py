"""What the ranks tell each other once a step: one small reduction, on a group that no hook of ZeRO uses."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from madpo.trainer.waiting import waited


class Told(NamedTuple):
    """What one rank has to say; agreed, the largest value that any rank has said."""

    stop: int = 0  # the number of the signal that asks this rank to stop; 0: none
    writing: int = 0  # the state of the checkpoint under way, see `checkpoints.saver`
    save: int = 0  # 1: it is time for a checkpoint
    odd: int = 0  # 1: the loss of the step before stands out


class Agreement:
    """The group in which ranks agree. Every rank must make it, and call it at the same places."""

    def __init__(self, timeout_minutes: float = 30.0) -> None:
        self._is_alone, timeout = dist.get_world_size() == 1, timedelta(minutes=timeout_minutes)
        # On the host, so that there is no kernel to wait for.
        self.group = None if self._is_alone else dist.new_group(backend="gloo", timeout=timeout)

    def on(self, told: Told) -> Told:
        """The largest value of each field over all ranks, which waits for the slowest of them."""
        if self._is_alone:
            return told
        values = torch.tensor(told, dtype=torch.int32)
        with waited():
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return Told(*values.tolist())

    def close(self) -> None:
        """Free the group."""
        if isinstance(self.group, dist.ProcessGroup):
            dist.destroy_process_group(self.group)
