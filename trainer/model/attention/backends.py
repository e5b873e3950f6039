"""The back-ends by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from madpo.trainer.model.attention import flex, sdpa, varlen
from madpo.trainer.model.attention.inputs import Call


@dataclass(frozen=True)
class Backend:
    label: str
    attend: Callable[[Call], Tensor]  # -> (1, N, heads, head_dim)
    problem: Callable[[Call], str | None]  # why it does not compute the call; None: it may be tried


BACKENDS = {
    **{
        f"flash{version}": Backend(
            f"flash-attn {version}",
            partial(varlen.flash_attend, version=version),
            partial(varlen.flash_problem, version=version),
        )
        for version in varlen.FLASH
    },
    "torch": Backend("torch's varlen_attn", varlen.torch_attend, varlen.torch_problem),
    "flex": Backend("FlexAttention", flex.attend, flex.problem),
    "sdpa": Backend("SDPA, segment by segment", sdpa.attend, lambda call: None),
}
"""The fastest first."""
