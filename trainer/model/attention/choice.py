"""The choice of a back-end for a model's attention: the fastest that is right on this device.

What a kernel supports changes with its version and with the device, and some have returned a gradient
without the window that the forward had. So each is tried before the first step: it computes this model's
kinds of attention on random tokens, and its value and gradients are compared with SDPA's.
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
from madpo.trainer.model.attention.inputs import AttentionInputs
from madpo.trainer.model.attention.segments import SegmentTable
from madpo.trainer.model.attention.varlen import FLASH, flash_versions
from madpo.trainer.packages import install

FLASHES = tuple(f"flash{version}" for version in FLASH)
CANDIDATES = {"auto": tuple(BACKENDS), "flash": FLASHES, "torch": ("torch",), "flex": ("flex",)}
"""`model.attention` -> the back-ends that are tried, in this order; `sdpa` needs no trial."""

MOST_TOKENS = 1024
"""Tokens of the longest window that the trial goes beyond."""

RESULTS = ("value", *(f"gradient of the {name}" for name in ("queries", "keys", "values", "sinks")))


class Choice(NamedTuple):
    """The back-end that was chosen, and why those before it were not."""

    name: str
    passed_over: dict[str, str]  # name -> reason

    def __str__(self) -> str:
        reasons = _reasons(self.passed_over)
        return BACKENDS[self.name].label + (f" ({reasons})" if reasons else "")


def choose(recorded: Sequence[AttentionInputs], wanted: str) -> Choice:
    """The first back-end of CANDIDATES[wanted] that computes all of the model's recorded inputs right.

    Raises UserError if none does.
    """
    passed_over = dict[str, str]()
    kinds = list({inputs.kind: inputs for inputs in recorded}.values())
    for name in CANDIDATES[wanted]:
        problem = next((why for inputs in kinds if (why := _problem(BACKENDS[name], inputs))), None)
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


def _problem(backend: Backend, inputs: AttentionInputs) -> str | None:
    return backend.problem(inputs) or (None if backend is BACKENDS["sdpa"] else trial(backend, inputs))


def trial(backend: Backend, inputs: AttentionInputs) -> str | None:
    """What is wrong with the back-end's value or gradients for inputs of this kind; None: nothing.

    Its errors on random tokens may be four times those of SDPA in the same precision, both measured against
    a higher one.
    """
    tensors = _random_tensors(inputs)
    higher = torch.float32 if inputs.query.element_size() < 4 else torch.float64
    truth = _value_and_gradients(BACKENDS["sdpa"], inputs, [x.to(higher) for x in tensors])
    usual = _value_and_gradients(BACKENDS["sdpa"], inputs, tensors)
    try:
        results = _value_and_gradients(backend, inputs, tensors)
    except Exception as error:  # whatever a kernel of some version and device may raise
        message = (str(error).strip() or repr(error)).splitlines()[0]
        return f"it fails on this model's attention: {message}"
    for name, x, y, z in zip(RESULTS, results, usual, truth, strict=False):
        error, allowed = (float((part.to(z) - z).norm() / z.norm()) for part in (x, y))
        if not error <= 4 * allowed + 1e-6:
            return f"its {name} is off by {error:.2g} (relative), where {allowed:.2g} is usual"
    return None


def _random_tensors(inputs: AttentionInputs) -> list[Tensor]:
    """Queries, keys, values and, where the inputs have them, sinks for `_segments`."""
    random = torch.Generator().manual_seed(0)
    tokens = _segments(inputs)[-1].end
    shapes = [(1, x.shape[1], tokens, x.shape[3]) for x in (inputs.query, inputs.key, inputs.value)]
    shapes += [] if inputs.sinks is None else [tuple(inputs.sinks.shape)]
    return [torch.randn(shape, generator=random).to(inputs.query) for shape in shapes]


def _segments(inputs: AttentionInputs) -> list[Segment]:
    """A prompt longer than the window with two completions, and a sequence that shares nothing."""
    window = min(inputs.mask_rule.local_size or 0, MOST_TOKENS)
    ends = [0, window + 70, window + 107, window + 251, window + 300]
    prompt = 0, ends[1]
    return [
        Segment(*prompt, 0, 0),
        Segment(ends[1], ends[2], *prompt),
        Segment(ends[2], ends[3], *prompt),
        Segment(ends[3], ends[4], ends[3], ends[3]),
    ]


@torch.enable_grad()
def _value_and_gradients(backend: Backend, inputs: AttentionInputs, tensors: list[Tensor]) -> list[Tensor]:
    """The back-end's output and gradients, named by RESULTS, computed on these `tensors`."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    query, key, value, *sinks = leaves
    fields: Any = {"query": query, "key": key, "value": value, "sinks": sinks[0] if sinks else None}
    out = backend.attend(dataclasses.replace(inputs, segments=SegmentTable(_segments(inputs)), **fields))
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out)
    gradients = torch.autograd.grad(out, leaves, weights.to(out.dtype), materialize_grads=True)
    return [out.detach(), *gradients]


def check_available(attention: str) -> None:
    """Raise UserError, before a model is loaded, if `model.attention` asks for what this machine lacks."""
    if attention in CANDIDATES and attention != "auto" and not torch.cuda.is_available():
        raise UserError(
            f"model.attention: {attention} trains on GPUs only, and there is none here; set "
            "model.attention=auto"
        )
    if attention == "flash" and not flash_versions():
        raise UserError(
            "model.attention: flash needs the flash-attn package; set model.attention=auto, which takes the "
            f"fastest that is there, or {install('madpo[flash-attn]')}"
        )
