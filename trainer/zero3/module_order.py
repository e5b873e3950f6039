"""The order of modules in a pass, which ZeRO-3 records to gather weights before they are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import madpo.trainer.zero3.internals  # noqa: F401


@contextmanager
def own_module_order(engine: Any, kind: str) -> Iterator[None]:
    """Let ZeRO-3 follow a module order of its own for this `kind` of pass, while inside.

    DeepSpeed keeps one order and drops it at the first module that it does not expect. For two passes it then
    gathers nothing ahead, and ranks compare what they recorded, number by number: a few hundred waits for the
    device. A kind is any text; passes of one kind must go through the modules in one order.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:  # not ZeRO-3, or no training, where there is one kind of pass
        yield
        return
    usual = offload.param_coordinator
    by_kind = vars(offload).setdefault("coordinator_by_kind", {})  # there, so that `release` frees it
    if kind not in by_kind:
        by_kind[kind] = _without_record(usual)
    offload.param_coordinator = by_kind[kind]
    try:
        yield
    finally:
        offload.param_coordinator = usual


def _without_record(coordinator: Any) -> Any:
    """A copy of ZeRO-3's coordinator that has recorded nothing; both share the gathers that are under way."""
    other = copy.copy(coordinator)
    if other.is_invalid_trace():
        other._clear_trace_structures()
    else:
        other._invalidate_trace()
    return other
