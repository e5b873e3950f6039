"""Which back-end computes a model's attention: the first that does it right where it runs.

What a kernel supports changes with its version and with the device, and some have returned a gradient
without the window that the forward had. So none is believed: before the first step it computes what this
model's layers ask for, on random tokens, and value and gradients are compared with SDPA's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from madpo.trainer.batches.packing import Segment
from madpo.trainer.errors import UserError
from madpo.trainer.model.attention.backends import BACKENDS, Backend
from madpo.trainer.model.attention.inputs import Call
from madpo.trainer.model.attention.segments import SegmentTable
from madpo.trainer.model.attention.varlen import FLASH, flash_versions

FLASHES = tuple(f"flash{version}" for version in FLASH)
CANDIDATES = {"auto": tuple(BACKENDS), "flash": FLASHES, "torch": ("torch",), "flex": ("flex",)}
"""`model.attention` -> what is tried, in this order; what is not here needs no trial."""

MOST_TOKENS = 1024
"""A window that is longer than this is not reached by the trial."""


RESULTS = ("value", *(f"gradient of the {name}" for name in ("queries", "keys", "values", "sinks")))


class Choice(NamedTuple):
    name: str
    passed_over: dict[str, str]  # name -> why

    def __str__(self) -> str:
        reasons = _reasons(self.passed_over)
        return BACKENDS[self.name].label + (f" ({reasons})" if reasons else "")


def choose(calls: Sequence[Call], wanted: str) -> Choice:
    """The back-end for a model that makes these calls. Raises UserError if the one that is wanted, or each
    of them, does not compute them."""
    passed_over = dict[str, str]()
    kinds = list({call.kind: call for call in calls}.values())
    for name in CANDIDATES[wanted]:
        problem = next((found for call in kinds if (found := _unfit(BACKENDS[name], call))), None)
        if problem is None:
            return Choice(name, passed_over)
        passed_over[name] = problem
    raise UserError(
        f"model.attention: {wanted} cannot be used here; {_reasons(passed_over)}. Set model.attention=auto"
    )


def _reasons(passed_over: dict[str, str]) -> str:
    by_reason = dict[str, list[str]]()
    for name, why in passed_over.items():
        by_reason.setdefault(why, []).append(BACKENDS[name].label)
    return "; ".join(f"{', '.join(labels)}: {why}" for why, labels in by_reason.items())


def _unfit(backend: Backend, call: Call) -> str | None:
    return backend.problem(call) or (None if backend is BACKENDS["sdpa"] else trial(backend, call))


def trial(backend: Backend, call: Call) -> str | None:
    """What is wrong with the value or the gradients of such a call on random tokens; None: nothing.

    Allowed are four times the errors of SDPA in the same precision, both measured against a higher one.
    """
    inputs = _random_inputs(call)
    exact = torch.float32 if call.query.element_size() < 4 else torch.float64
    truth = _value_and_gradients(BACKENDS["sdpa"], call, [x.to(exact) for x in inputs])
    usual = _value_and_gradients(BACKENDS["sdpa"], call, inputs)
    try:
        found = _value_and_gradients(backend, call, inputs)
    except Exception as error:  # whatever a kernel of some version and device may raise
        message = (str(error).strip() or repr(error)).splitlines()[0]
        return f"it fails on this model's attention: {message}"
    for what, x, y, z in zip(RESULTS, found, usual, truth, strict=False):
        error, allowed = (float((part.to(z) - z).norm() / z.norm()) for part in (x, y))
        if not error <= 4 * allowed + 1e-6:
            return f"its {what} is off by {error:.2g} (relative), where {allowed:.2g} is usual"
    return None


def _random_inputs(call: Call) -> list[Tensor]:
    """Queries, keys, values and sinks of `_segments`."""
    random = torch.Generator().manual_seed(0)
    tokens = _segments(call)[-1].end
    shapes = [(1, x.shape[1], tokens, x.shape[3]) for x in (call.query, call.key, call.value)]
    shapes += [] if call.sinks is None else [tuple(call.sinks.shape)]
    return [torch.randn(shape, generator=random).to(call.query) for shape in shapes]


def _segments(call: Call) -> list[Segment]:
    """A prompt beyond the window with two completions, and a sequence that shares nothing."""
    window = min(call.sight.local_size or 0, MOST_TOKENS)
    ends = [0, window + 70, window + 107, window + 251, window + 300]
    prompt = 0, ends[1]
    return [
        Segment(*prompt, 0, 0),
        Segment(ends[1], ends[2], *prompt),
        Segment(ends[2], ends[3], *prompt),
        Segment(ends[3], ends[4], ends[3], ends[3]),
    ]


@torch.enable_grad()
def _value_and_gradients(backend: Backend, call: Call, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    query, key, value, *sinks = leaves
    fields: Any = {"query": query, "key": key, "value": value, "sinks": sinks[0] if sinks else None}
    out = backend.attend(dataclasses.replace(call, segments=SegmentTable(_segments(call)), **fields))
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out)
    gradients = torch.autograd.grad(out, leaves, weights.to(out.dtype), materialize_grads=True)
    return [out.detach(), *gradients]


def require(attention: str) -> None:
    """Raise UserError if the back-end that is wanted has no chance here, before a model is loaded."""
    if attention == "flash" and not flash_versions():
        raise UserError(
            "model.attention: flash needs the flash-attn package: pip install 'madpo[flash-attn]', "
            "or set model.attention=auto"
        )
    if attention in CANDIDATES and attention != "auto" and not torch.cuda.is_available():
        raise UserError(f"model.attention: {attention} trains on GPUs only; set model.attention=auto")
