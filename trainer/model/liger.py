"""Liger's Triton kernels in a transformers model: norms, MLPs, rotary embeddings. Never its losses: the head
is ours.

Source: Hsu et al. 2024 (arXiv 2410.10989).
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from madpo.trainer.errors import UserError
from madpo.trainer.packages import install


def check_liger() -> None:
    """Raise UserError, before a model is loaded, without the package, and without a GPU."""
    if find_spec("liger_kernel") is None:
        raise UserError(f"model.use_liger_kernel: needs liger-kernel: {install('madpo[liger]')}")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("model.use_liger_kernel: its kernels run on GPUs only, and there is none; set false")


def use_kernels(model: PreTrainedModel, rotate: bool) -> None:
    """Give this model's layers Liger's forward functions; weights and their names stay.

    With `rotate`, rotary embeddings too, in all models of the family in this process. That kernel overwrites
    its queries and keys unseen by autograd, so it is not for selective checkpointing, which keeps them.

    Raises UserError as `check_liger`, and for a family that Liger does not know.
    """
    check_liger()
    from liger_kernel.transformers import monkey_patch  # pyright: ignore[reportMissingImports]

    family = model.config.model_type
    if family not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"model.use_liger_kernel: Liger has no kernels for {family}; set false")
    before = _classes_of(model)
    monkey_patch._apply_liger_kernel_to_instance(
        model=model, rope=rotate, cross_entropy=False, fused_linear_cross_entropy=False
    )
    # Liger has replaced the family's classes too, for models that are made later: put them back.
    vars(sys.modules[type(model).__module__]).update(before)


def _classes_of(model: PreTrainedModel) -> dict[str, Any]:
    names = vars(sys.modules[type(model).__module__])
    return {name: value for name, value in names.items() if isinstance(value, type)}
