"""One call of a kernel for variable lengths, with the keys gathered: flash-attn 2, 3 and 4, and torch's own.

All of them align a causal mask at the bottom right where a segment has more keys than queries, and take a
window as the number of tokens before the query's own. What each is asked for here: the query at i of Q sees
of K keys those from i + K - Q - left to i + K - Q.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from madpo.trainer.model.attention.inputs import Call

HALVES = (torch.bfloat16, torch.float16)


def flash_attend(call: Call, version: int) -> Tensor:  # (1, N, heads, head_dim)
    """By flash-attn, one of `FLASH`."""
    function, accepted = flash_function(version)
    index = call.segments.varlen(call.query.device)
    before = None if call.sight.local_size is None else call.sight.local_size - 1
    options: dict[str, Any] = {"max_seqlen_q": index.max_queries, "max_seqlen_k": index.max_keys}
    if before is not None:
        options["window_size"] = (before, 0)
    if call.softcap is not None:
        options["softcap"] = call.softcap
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    # The first releases of version 4 take the longest lengths from the offsets.
    options = {key: x for key, x in options.items() if key in accepted or not key.startswith("max_seqlen")}
    out = function(
        *_gathered(call),
        cu_seqlens_q=index.query_offsets,
        cu_seqlens_k=index.key_offsets,
        softmax_scale=call.scale,
        causal=True,
        **options,
    )
    return (out[0] if isinstance(out, tuple) else out)[None]  # with some, the log-sum-exp stands behind it


def torch_attend(call: Call) -> Tensor:  # (1, N, heads, head_dim)
    """By torch.nn.attention.varlen, of which window_size (-1, 0) is the causal mask."""
    assert call.softcap is None, "refused at the start of the run"
    function, accepted = torch_function()
    index = call.segments.varlen(call.query.device)
    q, k, v = _gathered(call)
    if "enable_gqa" in accepted:
        options: dict[str, Any] = {"enable_gqa": call.is_grouped}
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
        scale=call.scale,
        window_size=(-1 if call.sight.local_size is None else call.sight.local_size - 1, 0),
        **options,
    )
    assert isinstance(out, Tensor)
    return out[None]


def _gathered(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """(N, heads, head_dim), (K, kv_heads, head_dim), (K, kv_heads, head_dim)"""
    assert call.sinks is None and call.sight.is_window, "refused at the start of the run"
    keys = call.segments.varlen(call.query.device).keys
    q, k, v = (x[0].transpose(0, 1) for x in (call.query, call.key, call.value))
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
"""flash-attn's versions, the newest first -> its function, of a package that may not be there."""

MAJORS = {4: (9, 10, 11), 3: (9,), 2: tuple(range(8, 13))}
"""Version -> compute capabilities, without the minor number, that it is made for."""


@functools.cache
def torch_function() -> tuple[Callable[..., Any], frozenset[str]]:
    """The function and its parameters, which differ between torch's versions. Raises ImportError where there
    is none yet."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@functools.cache
def flash_function(version: int) -> tuple[Callable[..., Any], frozenset[str]]:
    """The function and its parameters. Raises ImportError without the package."""
    function = FLASH[version]()
    return function, frozenset(inspect.signature(function).parameters)


def flash_versions() -> list[int]:
    """Those whose packages can be imported, the newest first."""
    found = []
    for version in FLASH:
        try:
            flash_function(version)
        except (ImportError, OSError):  # OSError: of a library built for another torch
            continue
        found.append(version)
    return found


def flash_problem(call: Call, version: int) -> str | None:
    """Why this version does not compute the call, as far as is known before it is tried."""
    device = call.query.device
    if version not in flash_versions():
        return "its package is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in MAJORS[version]:
        return f"it is not made for {torch.cuda.get_device_name(device)}"
    if version == 4 and call.softcap is not None:
        return "it has no gradient of soft-caps in rows of several sequences"
    return _common_problem(call)


def torch_problem(call: Call) -> str | None:
    """Why torch's kernel does not compute the call, as far as is known before it is tried."""
    if call.softcap is not None:
        return "it does not compute this model's soft-caps"
    if not {"window_size", "scale"} <= torch_function()[1]:
        return f"that of torch {torch.__version__} takes no window"
    odd = call.query.shape[3] % 8
    width = f"it wants heads of a multiple of 8 dimensions, not of {call.query.shape[3]}" if odd else None
    return _common_problem(call) or width


def _common_problem(call: Call) -> str | None:
    if call.query.device.type != "cuda":
        return "it runs on GPUs only"
    if call.query.dtype not in HALVES:
        return f"it computes in bfloat16, not in {str(call.query.dtype).removeprefix('torch.')}"
    if call.sinks is not None:
        return "it does not compute this model's attention sinks"
    if not call.sight.is_window:
        return "it does not compute this model's masks other than causal ones and sliding windows"
    return None
