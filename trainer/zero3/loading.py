"""Loading straight into ZeRO-3 partitions, so that no rank ever holds a whole model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero import partition_parameters as init
from deepspeed.utils import groups
from torch import Tensor, nn
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

import madpo.trainer.zero3.internals  # noqa: F401


class _Zero3Config:
    """The part of a DeepSpeed config that transformers reads; its own class for it would need accelerate."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        return self.config["zero_optimization"]["stage"] == 3


@contextmanager
def partitioned_loading(deepspeed_config: dict[str, Any]) -> Iterator[None]:
    """Have `from_pretrained` and `from_config` build straight into ZeRO-3 partitions, while inside."""
    config = _Zero3Config(deepspeed_config)  # transformers keeps a weak reference only
    create, wrap = groups._create_zero_param_parallel_group, init.zero_wrapper_for_fp_tensor_constructor

    def create_once(size: int) -> None:
        """Make the process group of ZeRO++'s second copy once; DeepSpeed would make one for every model."""
        if groups._get_zero_param_intra_parallel_group() is None:
            create(size)

    def wrap_constructor(
        function: Callable[..., Tensor], target_fp_dtype: torch.dtype | None, target_device: Any
    ) -> Callable[..., Tensor]:
        """Leave a constant the dtype that it names; DeepSpeed would give it that of the weights."""
        cast = wrap(function, target_fp_dtype, target_device)  # type: ignore[arg-type]
        keep = wrap(function, None, target_device)  # type: ignore[arg-type]
        if function is not torch.tensor:
            return cast
        return lambda *args, **kwargs: (keep if kwargs.get("dtype") else cast)(*args, **kwargs)

    set_hf_deepspeed_config(config)
    groups._create_zero_param_parallel_group = create_once
    init.zero_wrapper_for_fp_tensor_constructor = wrap_constructor
    try:
        yield
    finally:
        groups._create_zero_param_parallel_group = create
        init.zero_wrapper_for_fp_tensor_constructor = wrap
        unset_hf_deepspeed_config()


def gather_convolutions(model: nn.Module) -> None:
    """Have ZeRO-3 gather a layer with a convolution along the row (Mamba) as a whole.

    Such a layer hands the convolution's weight to a kernel without calling the module, and ZeRO-3 gathers for
    modules that are called.
    """
    from deepspeed.utils import set_z3_leaf_module

    for module in model.modules():
        if any(isinstance(child, nn.Conv1d) for child in module.children()):
            set_z3_leaf_module(module, True)
            module.register_forward_pre_hook(_show_input, with_kwargs=True)


def _show_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Pass the first input positionally and requiring grad.

    DeepSpeed releases such a layer's weights when that input's gradient arrives; without such an input, it
    does so before the gradients of the weights are formed.
    """
    first = next(iter(inspect.signature(module.forward).parameters))
    if not args and first in kwargs:
        kwargs = dict(kwargs)
        args = (kwargs.pop(first),)
    if args and torch.is_grad_enabled() and not args[0].requires_grad:
        args = (args[0].detach().requires_grad_(), *args[1:])
    return args, kwargs
