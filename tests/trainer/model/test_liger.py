"""Liger's layer kernels, interpreted: the same hidden states and gradients as transformers' own layers.

They exchange functions for the whole process, so that each test runs in one of its own.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from families import VOCAB, tiny_model
from harness import random_groups, run_ranks
from kernel_cases import relative_error
from triton.runtime import interpreter

from madpo.trainer.batches.packing import pack
from madpo.trainer.model import liger
from madpo.trainer.model.attention import prefix_sharing
from madpo.trainer.model.attention.prefix_sharing import SegmentTable
from madpo.trainer.model.backbone import last_hidden
from madpo.trainer.model.recompute import checkpoint_layers

needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
CASES = [
    *((name, False) for name in ("Llama 3", "Qwen3", "Gemma 2")),
    ("Llama 3", True),
    *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("Qwen2", "Mistral", "Phi-3")),
]


def fit_interpreter() -> None:
    """Triton's interpreter leaves a kernel's float argument a number, which in a compiled kernel is a tensor,
    and knows nothing of CUDA's library of functions."""
    from liger_kernel.ops import geglu, rms_norm  # pyright: ignore[reportMissingImports]

    rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)
    geglu.tanh = lambda x: 1 - 2 / (tl.exp(2 * x) + 1)
    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if isinstance(value, float):
            handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return convert(value)

    interpreter._implicit_cvt = with_floats


def hidden_and_gradients(model: Any) -> dict[str, torch.Tensor]:
    batch = pack(random_groups(2, vocab=VOCAB))
    hidden = last_hidden(model, batch, SegmentTable(batch.segments))
    hidden.square().mean().backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **named}


def with_and_without(shard, family: str, selective: bool) -> list[Any]:
    fit_interpreter()
    prefix_sharing.register()
    attention = prefix_sharing.NAMES["sdpa"]
    want = hidden_and_gradients(tiny_model(family, attention))
    model = tiny_model(family, attention)
    module: Any = sys.modules[type(model).__module__]
    rotate, norms = module.apply_rotary_pos_emb, {type(m) for m in model.modules() if "Norm" in str(type(m))}
    liger.use_kernels(model, rotate=not selective)
    if selective:
        checkpoint_layers(model.train(), selective=True)
    exchanged = sum("forward" in vars(m) for m in model.modules())
    classes_stay = norms <= {value for value in vars(module).values() if isinstance(value, type)}
    return [
        want,
        hidden_and_gradients(model),
        exchanged,
        classes_stay,
        module.apply_rotary_pos_emb is not rotate,
    ]


@needs_liger
@pytest.mark.ranks
@pytest.mark.parametrize("family, selective", CASES)
def test_layers_compute_what_transformers_computes(family, selective):
    """Positions are those of packed groups, which start again within the row; with kept products, which a
    rotation in place would spoil, rotary embeddings are not exchanged."""
    want, got, exchanged, classes_stay, rotates = run_ranks(1, with_and_without, family, selective)[0]
    assert exchanged >= 2 * 3 + 1, "two layers of two norms and an MLP, and the last norm"
    assert classes_stay and rotates is not selective
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) < 1e-5, name


def test_what_is_missing_is_said(monkeypatch):
    model: Any = tiny_model("Phi", "sdpa")
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs liger-kernel: .*pip install 'madpo\[liger\]'"):
        liger.use_kernels(model, rotate=True)
    monkeypatch.setattr(liger, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"use_liger_kernel: its kernels run on GPUs only"):
        liger.use_kernels(model, rotate=True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    patch: Any = ModuleType("monkey_patch")
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    package: Any = ModuleType("liger_kernel.transformers")
    package.monkey_patch = patch
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    with pytest.raises(ValueError, match=r"use_liger_kernel: Liger has no kernels for phi; set false"):
        liger.use_kernels(model, rotate=True)
