"""Attention by one call of a kernel for variable lengths: flash-attn 2, 3 and 4, and torch's own.

The keys of each segment, its prompt's and its own, are gathered first. All kernels align a causal mask at the
bottom right where a segment has more keys than queries, and take a window as the number of tokens before the
query's own: query i of Q attends to keys i + K - Q - window .. i + K - Q of K.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madpo.trainer.model.attention.inputs import AttentionInputs

HALVES = (torch.bfloat16, torch.float16)


def flash_attend(inputs: AttentionInputs, version: int) -> Tensor:  # (1, N, heads, head_dim)
    """Attention by flash-attn, a version of `FLASH`."""
    function, accepted = flash_function(version)
    index = inputs.segments.varlen(inputs.query.device)
    window = None if inputs.mask_rule.local_size is None else inputs.mask_rule.local_size - 1
    options: dict[str, Any] = {"max_seqlen_q": index.max_queries, "max_seqlen_k": index.max_keys}
    if window is not None:
        options["window_size"] = (window, 0)
    if inputs.softcap is not None:
        options["softcap"] = inputs.softcap
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    # The first releases of version 4 take the longest lengths from the offsets.
    options = {key: x for key, x in options.items() if key in accepted or not key.startswith("max_seqlen")}
    out = function(
        *_gathered(inputs),
        cu_seqlens_q=index.query_offsets,
        cu_seqlens_k=index.key_offsets,
        softmax_scale=inputs.scale,
        causal=True,
        **options,
    )
    return (out[0] if isinstance(out, tuple) else out)[None]  # some versions return the log-sum-exp too


def torch_attend(inputs: AttentionInputs) -> Tensor:  # (1, N, heads, head_dim)
    """Attention by torch.nn.attention.varlen, whose window_size (-1, 0) is the causal mask."""
    assert inputs.softcap is None, "refused at the start of the run"
    function, accepted = torch_function()
    index = inputs.segments.varlen(inputs.query.device)
    q, k, v = _gathered(inputs)
    if "enable_gqa" in accepted:
        options: dict[str, Any] = {"enable_gqa": inputs.is_grouped}
    else:
        options, copies = {}, q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
    out = function(
        q,
        k,
        v,
        index.query_offsets,
        index.key_offsets,
        index.max_queries,
        index.max_keys,
        scale=inputs.scale,
        window_size=(-1 if inputs.mask_rule.local_size is None else inputs.mask_rule.local_size - 1, 0),
        **options,
    )
    assert isinstance(out, Tensor)
    return out[None]


def _gathered(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (N, heads, head_dim), and the segments' keys and values (K, kv_heads, head_dim)."""
    assert inputs.sinks is None and inputs.mask_rule.is_window, "refused at the start of the run"
    keys = inputs.segments.varlen(inputs.query.device).keys
    q, k, v = (x[0].transpose(0, 1) for x in (inputs.query, inputs.key, inputs.value))
    if keys is not None:
        k, v = k.index_select(0, keys), v.index_select(0, keys)
    return q.contiguous(), k.contiguous(), v.contiguous()


def _flash2() -> Callable[..., Any]:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func


def _flash3() -> Callable[..., Any]:
    from flash_attn_interface import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func


def _flash4() -> Callable[..., Any]:
    from flash_attn.cute import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func


FLASH: dict[int, Callable[[], Callable[..., Any]]] = {4: _flash4, 3: _flash3, 2: _flash2}
"""flash-attn's version, the newest first -> import of its function; the package may be missing."""

MAJORS = {4: (9, 10, 11), 3: (9,), 2: tuple(range(8, 13))}
"""Version -> major compute capabilities that it is made for."""


@functools.cache
def torch_function() -> tuple[Callable[..., Any], frozenset[str]]:
    """torch's varlen_attn and its parameters, which differ between versions. Raises ImportError if this
    torch has none yet."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@functools.cache
def flash_function(version: int) -> tuple[Callable[..., Any], frozenset[str]]:
    """flash-attn's function and its parameters. Raises ImportError without the package."""
    function = FLASH[version]()
    return function, frozenset(inspect.signature(function).parameters)


def flash_versions() -> list[int]:
    """flash-attn's versions that can be imported, the newest first."""
    installed = []
    for version in FLASH:
        try:
            flash_function(version)
        except (ImportError, OSError):  # OSError: a library built for another torch
            continue
        installed.append(version)
    return installed


def flash_problem(inputs: AttentionInputs, version: int) -> str | None:
    """Why this version cannot compute these inputs, as far as is known without a trial."""
    device = inputs.query.device
    if version not in flash_versions():
        return "its package is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in MAJORS[version]:
        return f"it is not made for {torch.cuda.get_device_name(device)}"
    if version == 4 and inputs.softcap is not None:
        return "it has no gradient of soft-caps in rows of several sequences"
    return _common_problem(inputs)


def torch_problem(inputs: AttentionInputs) -> str | None:
    """Why torch's kernel cannot compute these inputs, as far as is known without a trial."""
    if inputs.softcap is not None:
        return "it does not compute this model's soft-caps"
    if not {"window_size", "scale"} <= torch_function()[1]:
        return f"that of torch {torch.__version__} takes no window"
    odd = inputs.query.shape[3] % 8
    width = f"it wants heads of a multiple of 8 dimensions, not of {inputs.query.shape[3]}" if odd else None
    return _common_problem(inputs) or width


def _common_problem(inputs: AttentionInputs) -> str | None:
    if inputs.query.device.type != "cuda":
        return "it runs on GPUs only"
    if inputs.query.dtype not in HALVES:
        return f"it computes in bfloat16, not in {str(inputs.query.dtype).removeprefix('torch.')}"
    if inputs.sinks is not None:
        return "it does not compute this model's attention sinks"
    if not inputs.mask_rule.is_window:
        return "it does not compute this model's masks other than causal ones and sliding windows"
    return None
