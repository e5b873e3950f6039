"""The order of modules in a pass, which ZeRO-3 learns in order to gather weights before they are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import madpo.trainer.zero3.internals  # noqa: F401


@contextmanager
def own_module_order(engine: Any, kind: str) -> Iterator[None]:
    """Inside are passes, with backward or without, that go through the modules in another order than those
    outside and those of another kind.

    DeepSpeed keeps one order and throws it away at the first module that is not the one it expects. Then it
    gathers nothing ahead for two passes, and ranks compare what they have recorded, number by number: a few
    hundred waits for the device. So each kind has a record of its own.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:  # not ZeRO-3, or no training, where all passes are of one kind
        yield
        return
    usual = offload.param_coordinator
    records = vars(offload).setdefault("records", {})
    if kind not in records:
        records[kind] = _unlearnt(usual)
    offload.param_coordinator = records[kind]
    try:
        yield
    finally:
        offload.param_coordinator = usual


def _unlearnt(coordinator: Any) -> Any:
    """Another one like it that has recorded nothing yet; both share what is being gathered just now."""
    other = copy.copy(coordinator)
    if other.is_invalid_trace():
        other._clear_trace_structures()
    else:
        other._invalidate_trace()
    return other
