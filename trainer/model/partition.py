"""Models that are partitioned while they load, so that no rank ever holds a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from deepspeed.utils import groups
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config


class _Zero3Config:
    """What transformers asks of an active DeepSpeed config; its own class would need accelerate."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return self.config["zero_optimization"]["stage"] == 3


@contextmanager
def partitioned_loading(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Inside, `from_pretrained` and `from_config` build straight into ZeRO-3 partitions."""
    config = _Zero3Config(deepspeed_config)  # transformers keeps a weak reference only
    set_hf_deepspeed_config(config)
    create = groups._create_zero_param_parallel_group

    def create_once(size: int) -> None:
        """The group that ZeRO++ keeps a second copy in is one, and DeepSpeed makes it with every model."""
        if groups._get_zero_param_intra_parallel_group() is None:
            create(size)

    groups._create_zero_param_parallel_group = create_once
    try:
        yield
    finally:
        groups._create_zero_param_parallel_group = create
        unset_hf_deepspeed_config()
