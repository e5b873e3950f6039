"""DeepSpeed's accelerator, chosen before its first import, which looks for one and warns if it finds none."""

from __future__ import annotations

import os


def choose_accelerator() -> None:
    """Tell DeepSpeed to use the CPU if there is no GPU, in this process and those that it starts."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
