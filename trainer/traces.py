"""The order of modules in a pass, which ZeRO-3 learns in order to gather weights before they are needed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def scoring_passes(engine: Any) -> Iterator[None]:
    """Inside are passes without backward, in a training step or between two.

    DeepSpeed keeps one order and throws it away at the first module that is not the one it expects. Then it
    gathers nothing ahead for two passes, and ranks compare what they have recorded, number by number: a few
    hundred waits for the device. So these passes have a record of their own.
    """
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is None:  # not ZeRO-3, or no training, where all passes are of this kind
        yield
        return
    training = offload.param_coordinator
    if not hasattr(offload, "scoring_coordinator"):
        offload.scoring_coordinator = _unlearnt(training)
    offload.param_coordinator = offload.scoring_coordinator
    try:
        yield
    finally:
        offload.param_coordinator = training


def _unlearnt(coordinator: Any) -> Any:
    """Another one like it that has recorded nothing yet; both share what is being gathered just now."""
    other = copy.copy(coordinator)
    if other.is_invalid_trace():
        other._clear_trace_structures()
    else:
        other._invalidate_trace()
    return other
