"""Inputs that the kernel tests share: odd sizes, unequal, empty and one-token completions."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from madpo.kernels.edge_loss import EdgeLoss, MarginWeight
from madpo.kernels.layout import GroupLayout
from madpo.kernels.naive import preference_loss_ref
from madpo.kernels.preference_loss import Reference, preference_loss
from madpo.kernels.transform import LogitTransform

DEVICE = "cuda" if os.environ.get("MADPO_TEST_GPU") == "1" and torch.cuda.is_available() else "cpu"
IMPLS = ("torch", "triton")
DTYPES = (torch.float32, torch.bfloat16)
H, V = 48, 1003
LENGTHS = (3, 5, 2, 1, 0, 4, 6, 5)
MARGINS = (0.3, -1.0, 7.0, 1e4)
ROW_BYTES = 1008 * 4
"""Bytes of one row of float32 logits in memory."""
WHOLE, CHUNKS, VOCAB_BLOCKS = 2**31, 15 * ROW_BYTES, 3 * ROW_BYTES
"""Budgets: for all rows of LENGTHS; for the first three pairs; and one so small that two of the pairs are
walked a block of the vocabulary at a time, even with narrow logits."""


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # (M, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (M,)
    groups: GroupLayout
    reference: Reference

    def to(self, dtype: torch.dtype) -> Inputs:
        ref = self.reference
        narrowed = {k: getattr(ref, k) for k in ("hidden", "weight", "bias")}
        reference = {k: None if v is None else v.to(dtype) for k, v in narrowed.items()}
        return Inputs(
            self.hidden.detach().to(dtype),
            self.weight.detach().to(dtype),
            None if self.bias is None else self.bias.detach().to(dtype),
            self.targets,
            self.groups,
            Reference(**reference, token_logps=ref.token_logps, logps=ref.logps),
        )


def make_inputs(
    dtype: torch.dtype = torch.float32,
    lengths: tuple[int, ...] = LENGTHS,
    bias: bool = False,
    hidden_size: int = H,
    vocab_size: int = V,
) -> Inputs:
    """Pairs whose reference is near the policy; everything exactly representable in `dtype`."""
    rows = sum(lengths)
    hidden = torch.randn(rows, hidden_size)
    weight = torch.randn(vocab_size, hidden_size) * 0.3
    near = Reference(hidden + 0.1 * torch.randn_like(hidden), weight + 0.01 * torch.randn_like(weight))
    if bias:
        near = Reference(near.hidden, near.weight, torch.randn(vocab_size))
    inputs = Inputs(
        hidden.to(DEVICE),
        weight.to(DEVICE),
        torch.randn(vocab_size).to(DEVICE) if bias else None,
        torch.randint(0, vocab_size, (rows,)).to(DEVICE),
        GroupLayout.pairs(lengths, DEVICE),
        Reference(*(None if x is None else x.to(DEVICE) for x in vars(near).values())),
    )
    return inputs.to(dtype)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def madpo(**kwargs: Any) -> EdgeLoss:
    weight = MarginWeight(c_max=4.0, c_min=0.25, lam=1.0, tau=7.0)
    return EdgeLoss(beta=0.3, margins=vector(*MARGINS), margin_weight=weight, **kwargs)


@dataclass(frozen=True)
class Case:
    loss: EdgeLoss
    options: dict[str, Any] = field(default_factory=dict)  # for `preference_loss` and naive torch
    bias: bool = False
    budget_bytes: int = WHOLE


WEIGHTS_OFFSETS = EdgeLoss(beta=0.3, weights=vector(1.0, 0.3, 0.0, 2.0), offsets=vector(0.1, -0.2, 1.0, 0.4))
CASES = {
    "dpo": Case(EdgeLoss(beta=0.3)),
    "smoothed": Case(EdgeLoss(beta=0.3, positive=0.9, negative=0.1)),
    "robust": Case(EdgeLoss(beta=0.3, positive=0.9 / 0.8, negative=-0.1 / 0.8)),
    "hinge": Case(EdgeLoss(beta=0.3, curve="hinge")),
    "ipo": Case(EdgeLoss(beta=0.3, curve="ipo")),
    "ipo_length": Case(EdgeLoss(beta=0.3, curve="ipo", length_normalised=True)),
    "simpo": Case(EdgeLoss(beta=2.0, offset=0.5, length_normalised=True)),
    "madpo": Case(madpo()),
    "madpo_amplify": Case(
        EdgeLoss(0.3, margins=vector(*MARGINS), margin_weight=MarginWeight(4.0, 0.25, 1.0, 7.0, lowest=1.0))
    ),
    "madpo_regularise": Case(
        EdgeLoss(0.3, margins=vector(*MARGINS), margin_weight=MarginWeight(4.0, 0.25, 1.0, 7.0, highest=1.0))
    ),
    "madpo_odd": Case(
        EdgeLoss(
            0.2,
            margins=vector(1.1, -0.8, 2.9, 4.0),
            margin_weight=MarginWeight(c_max=3.0, c_min=0.6, lam=2.0, tau=1.5, margin_scale=0.7),
        )
    ),
    "madpo_smoothed_length": Case(madpo(positive=0.9, negative=0.1, length_normalised=True)),
    "weights_offsets": Case(WEIGHTS_OFFSETS),
    "weights_offsets_two_chunks": Case(WEIGHTS_OFFSETS, budget_bytes=CHUNKS),
    "scale": Case(madpo(), {"scale": 0.125}),
    "softcap": Case(madpo(), {"transform": LogitTransform(softcap=5.0)}),
    "everything": Case(
        madpo(), {"transform": LogitTransform(scale=0.7, softcap=8.0, temperature=0.6)}, bias=True
    ),
    "two_chunks": Case(madpo(), budget_bytes=CHUNKS),
    "vocab_blocks": Case(
        madpo(), {"transform": LogitTransform(softcap=8.0)}, True, budget_bytes=VOCAB_BLOCKS
    ),
}
ONLY_THE_EDGES = {"smoothed", "robust", "hinge", "ipo", "scale"}
"""Cases that differ from others only in the loss of the edges, which is formed in wide dtypes anyway."""


def run(
    inputs: Inputs, case: Case, impl: str, needs: tuple[bool, bool] = (True, True), **kwargs: Any
) -> dict[str, Any]:
    """Our loss, log-probs and gradients."""
    leaves = _leaves(inputs, needs)
    out = preference_loss(
        leaves[0],
        leaves[1],
        inputs.targets,
        inputs.groups,
        case.loss,
        inputs.reference,
        bias=leaves[2],
        budget_bytes=case.budget_bytes,
        impl=impl,  # pyright: ignore[reportArgumentType]
        **case.options,
        **kwargs,
    )
    if out.loss.requires_grad:
        out.loss.backward()
    return _results(out.loss, out.token_logps, out.ref_token_logps, leaves)


def run_ref(inputs: Inputs, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The loss, log-probs and gradients by naive torch, in `dtype`."""
    inputs = inputs.to(dtype)
    leaves = _leaves(inputs, (True, True))
    loss, logps, ref_logps = preference_loss_ref(
        leaves[0],
        leaves[1],
        inputs.targets,
        inputs.groups,
        case.loss,
        inputs.reference,
        bias=leaves[2],
        **case.options,
    )
    loss.backward()
    return _results(loss, logps, ref_logps, leaves)


def _leaves(inputs: Inputs, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor, Tensor | None]:
    bias = None if inputs.bias is None else inputs.bias.clone().requires_grad_(needs[1])
    return (
        inputs.hidden.clone().requires_grad_(needs[0]),
        inputs.weight.clone().requires_grad_(needs[1]),
        bias,
    )


def _results(
    loss: Tensor, logps: Tensor, ref_logps: Tensor | None, leaves: tuple[Tensor, Tensor, Tensor | None]
) -> dict[str, Any]:
    return {
        "loss": loss.detach(),
        "token_logps": logps.detach(),
        "ref_token_logps": ref_logps,
        "d_hidden": leaves[0].grad,
        "d_weight": leaves[1].grad,
        "d_bias": None if leaves[2] is None else leaves[2].grad,
    }


def relative_error(got: Tensor | None, want: Tensor | None) -> float:
    """Norm of the difference over the norm of the truth."""
    assert got is not None and want is not None
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
