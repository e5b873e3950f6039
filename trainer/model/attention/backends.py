"""The back-ends of attention, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from madpo.trainer.model.attention import flex, sdpa, varlen
from madpo.trainer.model.attention.inputs import AttentionInputs


@dataclass(frozen=True)
class Backend:
    label: str
    attend: Callable[[AttentionInputs], Tensor]  # -> (1, N, heads, head_dim)
    # Why it cannot compute these inputs, as far as is known without a trial.
    problem: Callable[[AttentionInputs], str | None]  # None: it may be tried


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
    "sdpa": Backend("SDPA, segment by segment", sdpa.attend, lambda inputs: None),
}
"""Back-end by name, the fastest first."""
